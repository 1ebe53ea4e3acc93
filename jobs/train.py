"""`raysal train` as a Ray job, from a checkout:

ray job submit --working-dir . --entrypoint-num-cpus 1 --runtime-env-json '{"env_vars": {"RAYSAL_JOB_CPUS": "1"}}' -- \
    python jobs/train.py --config configs/marsscapes.yaml --set run=s3://mission/runs/once --set data.root=s3://mission/labelled
"""

from raysal.cli import main

main("train")
