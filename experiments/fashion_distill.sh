#!/usr/bin/env bash
# Does a teacher help a student of 108 applications? Cross-entropy, a live teacher and stored labels (top 5), three
# seeds each, at equal images in equal views. About an hour on one core; the same command continues.
#
#   experiments/fashion_distill.sh SOURCE    # the folder with Fashion-MNIST's four IDX files
#
# Everything is written into the working folder: shards/, labels/, runs/. docs/results.md has the table.
set -euo pipefail
source=$1
here=$(dirname "$(readlink -f "$0")")
export OMP_NUM_THREADS=1

sret-scale shards write idx "$source" shards/train --split train
sret-scale shards write idx "$source" shards/test --split test
sret-scale train "$here/fashion_teacher.yaml" --ranks 1 --run runs/teacher

# The rate of fashion_student.yaml was chosen by these, for cross-entropy on a tenth of the images.
for rate in 1.0e-3 2.0e-3 4.0e-3; do
    sret-scale train "$here/fashion_student.yaml" --ranks 1 --run "runs/pilot_$rate" optim.learning_rate="$rate" \
        train.total_images=6000 optim.warmup_images=600
done

sret-scale labels write shards/train labels/teacher --teacher run:runs/teacher --views 1 --top-k 5 \
    --recipe "$here/fashion_student.yaml"
sret-scale labels verify labels/teacher shards/train

for seed in 0 1 2; do
    sret-scale train "$here/fashion_student.yaml" --ranks 1 --run "runs/ce_$seed" train.seed=$seed
    sret-scale train "$here/fashion_student.yaml" --ranks 1 --run "runs/live_$seed" train.seed=$seed \
        distill.teacher=run:runs/teacher
    sret-scale train "$here/fashion_student.yaml" --ranks 1 --run "runs/stored_$seed" train.seed=$seed \
        distill.teacher=labels:labels/teacher
done

python - <<'TABLE'
import json
from pathlib import Path
from statistics import mean, stdev

def top1(run):
    lines = map(json.loads, Path("runs", run, "metrics.jsonl").read_text().splitlines())
    return [100 * line["top1"] for line in lines if line["kind"] == "eval"][-1]

print(f"teacher {top1('teacher'):.2f} %")
for arm in ("ce", "live", "stored"):
    values = [top1(f"{arm}_{seed}") for seed in (0, 1, 2)]
    print(f"{arm:7s} {mean(values):.2f} +- {stdev(values):.2f} %  {' '.join(f'{value:.2f}' for value in values)}")
TABLE
