"""`raysal evaluate` as a Ray job, from a checkout:

ray job submit --working-dir . --entrypoint-num-cpus 1 --runtime-env-json '{"env_vars": {"RAYSAL_JOB_CPUS": "1"}}' -- \
    python jobs/evaluate.py s3://mission/models/current s3://mission/labelled --split val
"""

from raysal.cli import main

main("evaluate")
