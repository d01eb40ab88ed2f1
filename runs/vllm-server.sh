# Sourced by the scripts that serve with vLLM: what is served, and the commands that serve it.

# Exports into $OUT/vllm (target/, stale/, aligned/) unless they are there; sets PROMPTS and the rest of embedded.env.
prepare_vllm() {
  # shellcheck source=runs/embedded.env
  [ ! -f runs/embedded.env ] || . runs/embedded.env
  for name in TARGET STALE ALIGNED PROMPTS; do
    [ -n "${!name:-}" ] || { echo "set $name (see the head of $0)" >&2; exit 2; }
  done
  [ -f "$OUT/vllm/aligned/config.json" ] || "$PYTHON" runs/vllm_prepare.py --target "$TARGET" \
    ${ADAPTER:+--adapter "$ADAPTER"} --stale "$STALE" --aligned "$ALIGNED" --out "$OUT/vllm" \
    --speculative-tokens "$TOKENS"
}

# The command line of a server, plain or with the draft $1, quoted for `redraft bench --server NAME=COMMAND`.
# No prefix caching: the same prompts come at every level, and each is to pay for its prefill.
vllm_command() {
  local threads=${THREADS:-$(nproc)}
  local command=(env -u PYTHONPATH HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=WARNING
    "OMP_NUM_THREADS=$threads" "VLLM_CPU_OMP_THREADS_BIND=0-$((threads - 1))" VLLM_CPU_NUM_OF_RESERVED_CPU=0
    "VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2}"
    "$VLLM_PYTHON" -m vllm.entrypoints.openai.api_server --model "$OUT/vllm/target" --served-model-name target
    --host 127.0.0.1 --port '{port}' --dtype bfloat16 --max-model-len 1024 --max-num-seqs 16
    --no-enable-prefix-caching)
  if [ $# -gt 0 ]; then
    command+=(--speculative-config
      "{\"model\": \"$OUT/vllm/$1\", \"method\": \"eagle3\", \"num_speculative_tokens\": $TOKENS}")
  fi
  # the quoting takes the braces for the shell's, redraft is to find the place of the port
  printf '%q ' "${command[@]}" | sed 's/\\{port\\}/{port}/'
}
