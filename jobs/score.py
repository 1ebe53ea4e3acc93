"""`raysal score` as a Ray job, from a checkout:

ray job submit --working-dir . --entrypoint-num-cpus 1 --runtime-env-json '{"env_vars": {"RAYSAL_JOB_CPUS": "1"}}' -- \
    python jobs/score.py s3://mission/models/current s3://mission/manifest --out s3://mission/scores
"""

from raysal.cli import main

main("score")
