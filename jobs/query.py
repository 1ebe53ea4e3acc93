"""`raysal query` as a Ray job, from a checkout:

ray job submit --working-dir . --entrypoint-num-cpus 1 --runtime-env-json '{"env_vars": {"RAYSAL_JOB_CPUS": "1"}}' -- \
    python jobs/query.py s3://mission/scores --strategy ueq --budget 42 --out s3://mission/queue.parquet
"""

from raysal.cli import main

main("query")
