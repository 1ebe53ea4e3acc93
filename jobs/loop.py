"""`raysal loop` as a Ray job, from a checkout:

ray job submit --working-dir . --entrypoint-num-cpus 1 --runtime-env-json '{"env_vars": {"RAYSAL_JOB_CPUS": "1"}}' -- \
    python jobs/loop.py --config configs/marsscapes.yaml --set run=s3://mission/runs/mars --set data.root=s3://mission/labelled
"""

from raysal.cli import main

main("loop")
