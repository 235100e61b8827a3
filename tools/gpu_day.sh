#!/usr/bin/env bash
# What only a GPU can tell, in about 25 minutes: correctness, speed, then training.
#
#   tools/gpu_day.sh OUT                 # writes OUT/*.txt and OUT/*.json as it goes
#   tools/gpu_day.sh OUT --dry-run       # the same at toy size on the CPU, in minutes
#
# Each step has a time limit and a file of its own, so that a run that is cut short keeps what it
# has; OUT/summary.txt has a line for each. Needs no network. The last step trains, on the clips of
# SPEECH (a folder with training.txt and validation.txt; made-up sound where there is none), with the
# config CONFIG, from the weights WARM_START if they are given, until MINUTES are over.
#
#   SPEECH=my_corpus CONFIG=configs/frame_v2.json MINUTES=25 tools/gpu_day.sh OUT
set -u
cd "$(dirname "$0")/.."
out=$1
dry_run=${2:-}
PYTHON=${PYTHON:-python}
MINUTES=${MINUTES:-25}
CONFIG=${CONFIG:-config_v2.json}
configs="config_v1.json config_v2.json configs/istft_v2.json configs/hifigan_v1.json configs/hifigan_v2.json"
device=cuda batch="16 64" seconds="1 4 20" repeats=5 workers="1 2 4 8" updates=200 compile=--compile
if [ "$dry_run" = --dry-run ]; then
    device=cpu batch=2 seconds=1 repeats=1 workers=1 updates=4 compile=
    configs=config_v2.json
fi
mkdir -p "$out"
end=$((SECONDS + MINUTES * 60))

# step NAME SECONDS COMMAND...: runs it within its limit and within what is left of the day
step() {
    local name=$1 limit=$2 left=$((end - SECONDS))
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "$name: left out, no time" | tee -a "$out/summary.txt"
        return
    fi
    local begin=$SECONDS
    timeout --signal=TERM --kill-after=60 "$limit" "$@" >"$out/$name.txt" 2>&1
    echo "$name: status $?, $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
}

# A corpus and the configs: as they are, or at toy size.
"$PYTHON" - "$out" "$dry_run" "${SPEECH:-}" "$CONFIG" $configs <<'PY' || exit 1
import json, sys
from pathlib import Path

sys.path.insert(0, ".")
from tools.toy import TOY, make_corpus

out, dry_run, speech, *configs = sys.argv[1:]
for path in map(Path, configs):
    changes = TOY if dry_run else {}
    text = json.dumps(json.loads(path.read_text()) | changes, indent=4)
    (Path(out) / f"{path.stem}.json").write_text(text)
if not speech and not (Path(out) / "corpus").exists():
    (Path(out) / "corpus").mkdir()
    make_corpus(Path(out) / "corpus", clips=7 if dry_run else 200)
PY
speech=${SPEECH:-$out/corpus}
wavs=$speech
[ -d "$speech/wavs" ] && wavs=$speech/wavs
corpus=(--input_wavs_dir "$wavs" --input_training_file "$speech/training.txt"
    --input_validation_file "$speech/validation.txt" --device "$device")
local_configs=""
for config in $configs; do local_configs="$local_configs $out/$(basename "$config")"; done

nvidia-smi >"$out/nvidia-smi.txt" 2>&1
step tests 300 "$PYTHON" -m pytest -q -m requires_cuda tests
for config in $local_configs; do
    name=$(basename "$config" .json)
    step "train_$name" 150 "$PYTHON" tools/benchmark.py --train $compile --config "$config" \
        --batch_size $batch --repeats $repeats --device $device --output "$out/train_$name.figures.json"
done
step infer 240 "$PYTHON" tools/benchmark.py --infer --config $local_configs --seconds $seconds \
    --repeats $repeats --device $device --output "$out/infer.figures.json"
step profile 90 "$PYTHON" tools/profile_step.py --config "$out/config_v2.json" --precision bf16 \
    --batch_size ${batch%% *} --device $device
for count in $workers; do
    sed "s/\"num_workers\": [0-9]*/\"num_workers\": $count/" "$out/config_v2.json" \
        >"$out/workers_$count.json"
    step "loader_$count" 60 "$PYTHON" train.py --config "$out/workers_$count.json" "${corpus[@]}" \
        --precision bf16 --checkpoint_path "$out/cp_loader_$count" --training_steps $updates \
        --stdout_interval $((updates / 4)) --checkpoint_interval 1000000
done
step training $((MINUTES * 60)) "$PYTHON" train.py --config "$out/$(basename "$CONFIG")" "${corpus[@]}" \
    --precision bf16 --checkpoint_path "$out/cp_training" ${WARM_START:+--warm_start $WARM_START} \
    --training_epochs 1000000 --checkpoint_interval 500 --validation_interval 500 \
    --stdout_interval 50 --eval_metrics ${dry_run:+--training_steps 4}
echo "figures and logs in $out"
