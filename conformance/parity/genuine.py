"""The genuine exporter: `gpt_oss/metal/scripts/create-local-model.py` of the PyPI package gpt-oss 0.0.9, unchanged."""

import ast
import contextlib
import importlib.util
import io
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".parity/gpt-oss/gpt_oss/metal/scripts/create-local-model.py"

_spec = importlib.util.spec_from_file_location("create_local_model", SCRIPT)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)


def export(source, target):
    """Runs the script's `main`. Whatever it raises passes through."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        _module.main(["-s", str(source), "-d", str(target)])


def transform_qkv(qkv, spec):
    """Executes the script's own statements on one QKV tensor, in place, one by one.

    Returns the intermediate tensors: `interleaved` (Q and K rows reordered), then `q`, `k` and `v` as they are joined."""
    main = next(node for node in ast.parse(SCRIPT.read_text()).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    loop = next(
        node for node in ast.walk(main)
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and node.target.id == "qkv"
    )
    names = {
        "torch": _module.torch, "qkv": qkv, "head_dim": 64,
        "num_q_heads": spec["heads"], "num_kv_heads": spec["kv_heads"],
    }
    interleaved = None
    for statement in loop.body:
        exec(compile(ast.Module([statement], []), str(SCRIPT), "exec"), names)
        if "q" in names and interleaved is None:
            interleaved = names["qk"].clone()  # Q and K are scaled in place, which changes qk
    return {"interleaved": interleaved, "q": names["q"], "k": names["k"], "v": names["v"]}
