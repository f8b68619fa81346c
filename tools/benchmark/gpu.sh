#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in about ten minutes: tools/benchmark/gpu.sh [FOLDER]
# The steps of backbones in bfloat16 with their peak of memory, in both memory formats, compiled and
# not; then Mask R-CNN and RT-DETRv2 from image files on, with the share of the time in which the
# GPU is busy. The results go to FOLDER, output/gpu by default.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
folder=${1:-output/gpu}
mkdir -p "$folder"
many=resnet50,resnet18,efficientnet_b0,regnety_008,convnext_tiny,swin_tiny_patch4_window7_224
many+=,vit_small_patch16_224
gpu=(--device cuda --amp --size 800x1216 --rounds 10)

"$python" tools/benchmark/backbones.py "${gpu[@]}" --variants --models $many \
    --output "$folder/backbones" --overwrite
"$python" tools/benchmark/backbones.py "${gpu[@]}" --compile --train \
    --models resnet50,convnext_tiny,swin_tiny_patch4_window7_224 \
    --output "$folder/compiled" --overwrite

shapes=$folder/shapes
"$python" tools/draw_shapes.py --output "$shapes" --size 1024 --train 64 --val 8 --overwrite
for config in mask_rcnn rt_detr; do
    run=$folder/$config
    backbone=model.backbone
    [[ $config == rt_detr ]] || backbone+=.bottom_up
    nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits -l 1 >"$run.busy" &
    watch=$!
    trap 'kill $watch 2>/dev/null || true' EXIT
    "$python" -m detbackbones train --config-file finetune/$config.py --overwrite \
        dataset.{train_json="$shapes/train.json",train_images="$shapes/images/train"} \
        dataset.{val_json="$shapes/val.json",val_images="$shapes/images/val"} \
        'dataset.train_sizes=[800]' dataset.val_size=800 dataset.max_size=1333 \
        $backbone.{model_name=resnet50,pretrained=False} train.output_dir="$run" \
        dataloader.train.{total_batch_size=8,num_workers=8} train.amp.enabled=True \
        train.{max_iter=100,eval_period=0,pictures=0}
    kill $watch
    awk -v run="$run" '{ sum += $1 } END { print run, "GPU busy, percent:", sum / NR }' "$run.busy"
done
