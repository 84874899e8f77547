"""The choice of a backend, its explanations, and what makes all backends agree on dropout."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings

import pytest
import torch
from support.ipsa import SMALL

import xattn_ops
from xattn_ops import _backend, _library, available_backends, explain, inner_patch_attention
from xattn_ops._dropout import draw_seed, keep_mask, philox

FUNCTIONS = [
    "inner_patch_attention",
    "cross_patch_attention",
    "conv_relative_attention",
    "conv_position_encoding",
    "cls_cross_attention",
    "digest_attention",
    "token_merge_enhance",
]
WITH_TRITON = {name for name in FUNCTIONS if "triton" in _backend._KERNELS[name]}
functions = pytest.mark.parametrize("function", FUNCTIONS)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XATTN_BACKEND", raising=False)
    monkeypatch.delenv("XATTN_STRICT", raising=False)
    for function in WITH_TRITON:  # loaded before the interpreter is turned off, for later tests
        _backend.refusal(function, "triton", _backend.Call("cuda", torch.float32))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # conftest.py: not what users have
    monkeypatch.setattr(_backend, "_warned", set())
    monkeypatch.setattr(_library, "CUDA_REASON", "no cuda library")


def choose(function: str, backend: str | None = None, device: str = "cpu") -> str:
    return _backend.choose(function, backend, device, torch.float32)


def test_native_library_is_there() -> None:
    """The tests are run where the kernels are built; without them half of this suite is idle."""
    assert _library.NATIVE, _library.REASON


# ------------------------------------------------------------------------------------ the choice


@functions
def test_cpu_tensors_take_the_kernels(function: str) -> None:
    assert choose(function) == "cpu"


@functions
def test_other_devices_take_the_reference_quietly(function: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(function, device="meta") == "reference"


def test_meta_tensors_go_through() -> None:
    tensors = {name: t.to("meta") for name, t in SMALL.tensors(torch.float32).items()}
    assert inner_patch_attention(**tensors, **SMALL.options).shape == SMALL.outs["out"]


@functions
def test_cuda_tensors_take_triton_or_fall_back(function: str) -> None:
    if function in WITH_TRITON:
        assert choose(function, device="cuda") == "triton"
        return
    with pytest.warns(UserWarning, match=f"no cuda library; .* {function} has no triton kernel"):
        assert choose(function, device="cuda") == "reference"


@functions
def test_cuda_tensors_fall_back_where_triton_is_missing(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_backend, "_triton_missing", lambda kernels: "no triton kernel loads")
    with pytest.warns(UserWarning, match="no cuda library; .* no triton kernel"):
        assert choose(function, device="cuda") == "reference"


@functions
@pytest.mark.usefixtures("no_native")
def test_fallback_warns_once_and_names_what_is_missing(function: str) -> None:
    reason = f"{function} falls back to the PyTorch reference on cpu tensors .cpu: no compiler"
    with pytest.warns(UserWarning, match=reason):
        assert choose(function) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(function) == "reference"


@pytest.mark.usefixtures("no_native")
def test_works_without_the_native_library() -> None:
    tensors = SMALL.tensors(torch.float32)
    with pytest.warns(UserWarning, match="no compiler was found"):
        out = inner_patch_attention(**tensors, **SMALL.options)
    torch.testing.assert_close(out, SMALL.reference(**tensors, **SMALL.options))


@functions
@pytest.mark.usefixtures("no_native")
def test_strict_forbids_the_fallback(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XATTN_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"no compiler was found.*XATTN_STRICT forbids it"):
        choose(function)
    assert choose(function, "reference") == "reference"


@pytest.mark.parametrize("value", ["", "0"])
@pytest.mark.usefixtures("no_native")
def test_strict_is_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XATTN_STRICT", value)
    with pytest.warns(UserWarning, match="falls back"):
        assert choose("inner_patch_attention") == "reference"


@functions
@pytest.mark.parametrize(
    ("backend", "device", "reason"),
    [
        ("cuda", "cpu", "it does not take cpu tensors"),
        ("cuda", "cuda", "no cuda library"),
        ("triton", "meta", r"has no triton kernel in this version|it does not take meta tensors"),
        ("cpu", "cuda", "it does not take cuda tensors"),
    ],
)
def test_named_backend_that_cannot_serve(
    function: str, backend: str, device: str, reason: str
) -> None:
    with pytest.raises(
        ValueError, match=f"backend '{backend}' cannot serve {function}: .*({reason})"
    ):
        choose(function, backend, device)


@pytest.mark.usefixtures("no_native")
def test_named_backend_without_its_library() -> None:
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot serve .*: no compiler was found"):
        choose("inner_patch_attention", "cpu")


def test_library_older_than_the_package() -> None:
    reason = "the native library is older than this package: no ipsa_from_the_future"
    assert xattn_ops._registration.missing("ipsa_fwd", "ipsa_from_the_future") == reason


def test_unknown_backend() -> None:
    with pytest.raises(
        ValueError, match="backend must be one of cuda, triton, cpu, reference, got 'gpu'"
    ):
        choose("inner_patch_attention", "gpu")


def test_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XATTN_BACKEND", "reference")
    assert choose("inner_patch_attention") == "reference"
    assert choose("inner_patch_attention", "cpu") == "cpu"  # who names one decides


def test_environment_forces_one_that_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XATTN_BACKEND", "triton")
    with pytest.raises(ValueError, match="XATTN_BACKEND 'triton' cannot serve"):
        choose("inner_patch_attention")


def test_environment_names_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XATTN_BACKEND", "avx")
    with pytest.raises(ValueError, match=r"XATTN_BACKEND must be one of .*, got 'avx'"):
        choose("inner_patch_attention")


def test_kernel_refuses_a_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel sees the call; its refusal is the reason that the caller reads."""

    def refuse(call: _backend.Call) -> str:
        return "" if call.dtype == torch.bfloat16 else f"no {call.dtype}"

    monkeypatch.setitem(_backend._KERNELS, "half", {"triton": refuse})
    assert _backend.choose("half", None, "cuda", torch.bfloat16) == "triton"
    with pytest.raises(ValueError, match=r"no torch\.float64"):
        _backend.choose("half", "triton", "cuda", torch.float64)


@functions
def test_cuda_kernels_refuse(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dtype, the library, the ops that it lacks, the card: the first that is wrong."""
    call = _backend.Call("cuda", torch.float32)

    def why(call: _backend.Call = call) -> str:
        return _backend.refusal(function, "cuda", call)

    assert why(call._replace(dtype=torch.float64)).startswith("its CUDA kernels take float32, bf")
    assert why() == "no cuda library"
    monkeypatch.setattr(_library, "CUDA_REASON", "")
    has_kernel = "_dispatch_has_kernel_for_dispatch_key"
    monkeypatch.setattr(torch._C, has_kernel, lambda op, key: not op.endswith("_bwd"))
    assert re.fullmatch(r"the native library has no CUDA kernel of \w+_bwd", why())
    monkeypatch.setattr(torch._C, has_kernel, lambda op, key: key == "CUDA")
    assert why() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert why() == "its CUDA kernels need compute capability 8.0, this card has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert why() == ""
    assert choose(function, device="cuda") == "cuda"


@pytest.mark.parametrize(
    ("toolkit", "driver", "reason"),
    [
        (13000, 13020, ""),
        (13020, 13000, ""),  # of one major version
        (12080, 13000, ""),
        (13000, 12090, "its CUDA kernels are built with CUDA 13.0, this driver goes up to 12.9"),
        (13010, 0, "its CUDA kernels are built with CUDA 13.1, this driver goes up to 0.0"),
    ],
)
def test_old_driver(toolkit: int, driver: int, reason: str) -> None:
    assert _library._old_driver(toolkit, driver) == reason


def test_cuda_library_without_a_cuda_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not even looked for, whatever is installed."""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _library._load_cuda() == "this torch is built without CUDA"


def test_cuda_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library.ctypes, "CDLL", lambda path, mode: None)
    monkeypatch.setitem(sys.modules, "xattn_ops._C_cuda", None)
    reason = _library._load_cuda()
    assert reason.startswith("the CUDA library xattn_ops._C_cuda could not be loaded")
    assert reason.endswith("install a CUDA toolkit (nvcc) and reinstall xattn_ops to build it")


def test_backends_agree_that_the_named_one_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="cpu" reaches the leaf op and backend="reference" does not."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(str(func))
            return func(*args, **(kwargs or {}))

    ran = {}
    for backend in ("cpu", "reference"):
        seen: set[str] = set()
        with Names():
            inner_patch_attention(**SMALL.tensors(torch.float32), **SMALL.options, backend=backend)
        ran[backend] = "xattn_ops.ipsa_fwd.default" in seen
    assert ran == {"cpu": True, "reference": False}


# ----------------------------------------------------------------------------------- the reports


def test_available_backends() -> None:
    assert available_backends() == {"cuda": False, "triton": False, "cpu": True, "reference": True}


@pytest.mark.usefixtures("no_native")
def test_available_backends_without_the_native_library() -> None:
    there = available_backends()
    assert (there["cpu"], there["reference"]) == (False, True)


def test_explain() -> None:
    explanation = explain(inner_patch_attention, torch.zeros(1, 7, 7, 12), num_heads=2)
    assert explanation.backend == "cpu"
    assert str(explanation).splitlines() == [
        "inner_patch_attention on cpu, float32: cpu",
        "  not cuda: it does not take cpu tensors",
        "  not triton: it does not take cpu tensors",
        "  not reference: cpu comes first",
    ]


def test_explain_a_named_backend() -> None:
    qkv = torch.zeros(1, 7, 7, 12)
    explanation = explain(inner_patch_attention, qkv, num_heads=2, backend="reference")
    assert explanation.backend == "reference"
    assert explanation.refused["cpu"] == "reference was asked for"


def test_explain_a_backend_that_cannot_serve() -> None:
    qkv = torch.zeros(1, 7, 7, 12)
    explanation = explain(inner_patch_attention, qkv, num_heads=2, backend="cuda")
    assert explanation.backend is None
    assert str(explanation).startswith("inner_patch_attention on cpu, float32: no backend\n")
    assert explanation.refused["cuda"] == "it does not take cpu tensors"


@pytest.mark.usefixtures("no_native")
def test_explain_a_fallback() -> None:
    explanation = explain(inner_patch_attention, torch.zeros(1, 7, 7, 12), num_heads=2)
    assert explanation.backend == "reference"
    assert explanation.refused["cpu"] == "no compiler was found"


def test_explain_takes_our_functions_alone() -> None:
    with pytest.raises(ValueError, match=r"explain takes one of .*inner_patch_attention.*, got"):
        explain(torch.softmax, torch.zeros(2), 0)


def test_explain_needs_a_tensor() -> None:
    with pytest.raises(TypeError, match="explain needs the tensors that inner_patch_attention"):
        explain(inner_patch_attention, [1, 2], num_heads=2)


def test_explain_needs_the_arguments() -> None:
    with pytest.raises(TypeError, match="num_heads"):
        explain(inner_patch_attention, torch.zeros(1, 7, 7, 12))


def test_import_brings_no_tools() -> None:
    """Importing the package loads no model and no benchmark."""
    code = "import sys, xattn_ops; print([m for m in sys.modules if m.startswith('xattn_ops.')])"
    names = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "xattn_ops.ipsa" in names
    assert "models" not in names
    assert "benchmarks" not in names


def test_import_without_the_native_library() -> None:
    code = (
        "import sys; sys.modules['xattn_ops._C'] = None\n"
        "import torch, xattn_ops\n"
        "from xattn_ops import _library\n"
        "assert not _library.NATIVE and _library.isa() == ''\n"
        "out = xattn_ops.inner_patch_attention(torch.zeros(1, 7, 7, 12), num_heads=2)\n"
        "print(tuple(out.shape))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "(1, 7, 7, 4)", ran.stderr
    assert "falls back to the PyTorch reference" in ran.stderr


# --------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        pytest.param(
            "00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8", id="0"
        ),
        pytest.param(
            "ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd", id="1"
        ),
        pytest.param(
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
            id="pi",
        ),
    ],
)
def test_philox_known_answers(counter: str, key: str, words: str) -> None:
    """The vectors that the authors of Philox published for 10 rounds."""
    got = philox(
        tuple(int(word, 16) for word in counter.split()),
        tuple(int(word, 16) for word in key.split()),
    )
    assert [f"{word:08x}" for word in got] == words.split()


def test_mask_golden() -> None:
    """The mask is part of the interface: a model trained on one version goes on with the next."""
    mask = keep_mask(torch.tensor(0x1234_5678_9ABC_DEF0), 2, 5, 6, 0.4)
    rows = ["".join("01"[bit] for bit in row) for row in mask.flatten(0, 1).int()]
    assert " ".join(rows[:5]) == "001111 100011 101111 010110 101011"
    assert " ".join(rows[5:]) == "111010 111011 111011 111111 111111"


def test_mask_by_its_definition() -> None:
    """Weight (i, j) of unit u: word i % 4 of counter ((i // 4) Nk + j, u) against p 2**32."""
    seed, n_q, n_k, p = -0x1234_5678_9ABC_DEF0, 7, 5, 0.25
    mask = keep_mask(torch.tensor(seed), 3, n_q, n_k, p)
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    for u, i, j in mask.new_ones(mask.shape).nonzero().tolist():
        words = philox(((i >> 2) * n_k + j, u, 0, 0), key)
        assert mask[u, i, j].item() == (words[i & 3].item() >= int(p * 2**32))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_statistics(p: float) -> None:
    """Kept at rate 1 - p, in every row, column and word alike, its neighbours apart."""
    keep = keep_mask(torch.tensor(7), 256, 48, 48, p).double()
    deviation = (p * (1 - p)) ** 0.5
    for axes in [(0, 1, 2), (0, 1), (0, 2), (1, 2)]:
        count = keep[:, :, :].mean(axes).numel()
        bound = 5 * deviation / (keep.numel() / count) ** 0.5
        assert (keep.mean(axes) - (1 - p)).abs().max() < bound, axes
    centred = (keep - (1 - p)) / deviation
    for axis in range(3):
        neighbours = (centred * centred.roll(1, axis)).mean()
        assert neighbours.abs() < 5 / keep.numel() ** 0.5, axis


def test_masks_of_two_seeds_differ() -> None:
    low, high = torch.tensor(1), torch.tensor(1 << 32)
    masks = [keep_mask(seed, 4, 49, 49, 0.5) for seed in (low, high)]
    agreement = (masks[0] == masks[1]).double().mean()
    assert 0.45 < agreement < 0.55


def test_seed_follows_the_generator() -> None:
    device = torch.device("cpu")
    seeds = []
    for start in (3, 3, 4):
        torch.manual_seed(start)
        seeds.append(draw_seed(device))
    assert seeds[0] == seeds[1] != seeds[2]
    assert seeds[0].dtype == torch.int64
    assert seeds[0].shape == ()


def test_no_dropout_draws_nothing() -> None:
    before = torch.get_rng_state()
    inner_patch_attention(**SMALL.tensors(torch.float32), **SMALL.options)
    assert torch.equal(before, torch.get_rng_state())
