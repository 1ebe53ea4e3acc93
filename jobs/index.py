"""`raysal index` as a Ray job, from a checkout:

ray job submit --working-dir . --entrypoint-num-cpus 1 --runtime-env-json '{"env_vars": {"RAYSAL_JOB_CPUS": "1"}}' -- \
    python jobs/index.py s3://archive/msl/ --out s3://mission/manifest
"""

from raysal.cli import main

main("index")
