#!/bin/sh
# Makes drafts with every trainer, each in an environment of its own, and compares them.
#
#     sh benchmarks/trainers/run.sh ENVIRONMENTS CASES
#
# ENVIRONMENTS is where virtual environments are made and kept, a folder for each; CASES is where the drafts go. PYTHON
# names the interpreter, 3.11 or newer; redraft must be installed for the python on the path. Packages that are pinned to
# other releases of torch than the one here run on it all the same, so they are installed without what they require.
set -eu

environments=$(mkdir -p "$1" && cd "$1" && pwd)
mkdir -p "$2"
cases=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}

# environment NAME PACKAGES..: makes it once
environment() {
    name=$1
    shift
    if [ ! -f "$environments/$name/made" ]; then
        "$python" -m venv "$environments/$name"
        "$environments/$name/bin/pip" install -q torch==2.13.0 safetensors numpy "$@"
        touch "$environments/$name/made"
    fi
}

# speculators RELEASE TRANSFORMERS PACKAGES..
speculators() {
    release=$1
    transformers=$2
    shift 2
    name=speculators-$release
    environment "$name" "transformers==$transformers" "datasets<5" pydantic pydantic-settings loguru click typer rich \
        psutil tqdm protobuf aiohttp httpx openai
    "$environments/$name/bin/pip" install -q --no-deps "speculators==$release" "$@"
    "$environments/$name/bin/python" "$here/make_speculators.py" "$cases"
}

speculators 0.5.0 5.6.2
speculators 0.6.0 5.10.2
speculators 0.7.0 5.10.2
speculators 0.8.1 5.16.0 hs-connectors==0.8.1
speculators 0.9.0 5.19.0 hs-connectors==0.9.0

environment specforge-0.2.0 transformers==5.8.1 "datasets<5" accelerate pydantic pyyaml tqdm psutil requests
"$environments/specforge-0.2.0/bin/pip" install -q --no-deps specforge==0.2.0
# Compiling the small functions of its layers costs minutes and changes nothing that is compared.
TORCHDYNAMO_DISABLE=1 "$environments/specforge-0.2.0/bin/python" "$here/make_specforge.py" "$cases"

environment modelopt transformers==5.14.1 nvidia-modelopt==0.47.0 accelerate peft omegaconf
"$environments/modelopt/bin/python" "$here/make_modelopt.py" "$cases"

environment automodel transformers==5.18.0 accelerate peft omegaconf datasets torchao==0.18.0 torchdata==0.11.0 pillow
"$environments/automodel/bin/pip" install -q --no-deps nemo-automodel==0.7.0
"$environments/automodel/bin/python" "$here/make_automodel.py" "$cases"

environment angelslim transformers==5.14.1 accelerate peft datasets pillow shortuuid
"$environments/angelslim/bin/pip" install -q --no-deps angelslim==0.5.0
"$environments/angelslim/bin/python" "$here/make_angelslim.py" "$cases"

# EAGLE-3 is not in its package: EAGLE names a checkout of its repository.
environment safeailab transformers==4.57.6 accelerate
"$environments/safeailab/bin/pip" install -q --no-deps eagle-llm==1.2.1
"$environments/safeailab/bin/python" "$here/make_safeailab.py" "$cases" ${EAGLE:+--repository "$EAGLE"}

python "$here/compare.py" "$cases" --out "$here/../results/trainers.json"

# The other way round: redraft's exports in the packages that they are for.
python "$here/exports.py" "$cases/exports"
"$environments/speculators-0.9.0/bin/python" "$here/open_exports.py" "$cases/exports" speculators
TORCHDYNAMO_DISABLE=1 "$environments/specforge-0.2.0/bin/python" "$here/open_exports.py" "$cases/exports" specforge
# An engine for each case; VLLM names the python of an environment that has vLLM for this machine.
${VLLM:+"$VLLM" "$here/open_exports.py" "$cases/exports" vllm}
