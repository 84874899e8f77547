"""The command line: info, and tools that are missing."""

import subprocess
import sys

import pytest
import torch

from xattn_ops import _library, cli, info
from xattn_ops._version import __version__


def test_info_names_versions_backends_and_what_is_missing(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"xattn_ops {__version__}" in out
    assert f"torch {torch.__version__}" in out
    assert "reference: yes" in out
    assert "inner_patch_attention on cpu, float32: " in out
    assert "cross_patch_attention on cpu, float32: " in out
    assert "conv_relative_attention on cpu, float32: " in out
    assert "conv_position_encoding on cpu, float32: " in out
    assert "digest_attention on cpu, float32: " in out
    assert "token_merge_enhance on cpu, float32: " in out
    assert ("CUDA: none" in out) or ("CUDA " in out)


def test_info_without_the_native_library_says_why_and_how_to_get_it(monkeypatch):
    monkeypatch.setattr(_library, "NATIVE", False)
    monkeypatch.setattr(_library, "REASON", "no library: install a compiler")
    text = info.describe()
    assert "native library: no" in text
    assert "Missing\n  CPU kernels: no library: install a compiler" in text


def test_info_with_the_native_library_names_the_instruction_set(monkeypatch):
    monkeypatch.setattr(_library, "NATIVE", True)
    monkeypatch.setattr(_library, "isa", lambda: "avx2")
    monkeypatch.setattr(_library, "unknown_isa", lambda: "avx9000")
    text = info.describe()
    assert "native library: yes, CPU kernels for avx2" in text
    assert "XATTN_ISA=avx9000 is not available here" in text


@pytest.mark.parametrize(
    ("built", "reason", "said"),
    [
        (False, "no CUDA", "CUDA library: no"),
        (True, "", "CUDA library: yes"),
        (True, "no CUDA in torch", "CUDA library: yes, not loaded: no CUDA in torch"),
    ],
)
def test_info_tells_of_the_cuda_library(monkeypatch, built, reason, said):
    monkeypatch.setattr(info, "find_spec", lambda name: object() if built else None)
    monkeypatch.setattr(_library, "CUDA_REASON", reason)
    assert f"  {said}\n" in info.describe()


def test_info_on_a_cuda_torch_says_what_its_kernels_miss(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "CUDA_REASON", "no library: install nvcc")
    assert "Missing\n  CUDA kernels: no library: install nvcc" in info.describe()


def test_info_without_the_tools_says_how_to_get_them(monkeypatch):
    there = info._version
    monkeypatch.setattr(info, "_version", lambda name: None if name == "rich" else there(name))
    text = info.describe()
    assert "rich not installed" in text
    assert "rich (demo, bench): pip install 'xattn_ops[tools]'" in text


def test_info_shows_the_variables_that_steer_the_package(monkeypatch):
    monkeypatch.setenv("XATTN_BACKEND", "reference")
    assert "XATTN_BACKEND=reference" in info.describe()


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "xattn_ops", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"xattn_ops {__version__}"


def test_a_missing_tool_is_named_with_the_way_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["demo"]) == 2
    assert "pip install 'xattn_ops[tools]'" in capsys.readouterr().err


def test_a_missing_module_of_ours_is_not_taken_for_a_missing_tool(monkeypatch):
    monkeypatch.setitem(sys.modules, "xattn_ops.demo", None)
    with pytest.raises(ModuleNotFoundError, match=r"xattn_ops\.demo"):
        cli.main(["demo"])
