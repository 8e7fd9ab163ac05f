"""Every path of the model keeps its tensors on one device. There is no GPU: `device_paths` uses the simulated one."""

import subprocess
import sys

from scripts.bench.common.record import ROOT


def test_no_path_mixes_tensors_of_two_devices() -> None:
    command = [sys.executable, "-m", "tests.keye.model.device_paths"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not done.returncode, f"{done.stdout}\n{done.stderr[-5000:]}"
