"""Who may import whom, which keeps families, methods and adapters apart."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOUNDATION = {
    "errors", "names", "files", "redact", "registry", "shipped", "ranks", "token_shards", "documents", "compiling",
    "cuda_graphs", "config", "config_types", "config_yaml", "config_load", "config_override",
}  # fmt: skip
ALLOWED = {  # part of torchft -> the parts that it may import
    **dict.fromkeys(FOUNDATION, FOUNDATION),
    "weights": FOUNDATION,
    "sentence_transformers": FOUNDATION,
    "staging": FOUNDATION,
    "vocabulary": FOUNDATION | {"weights", "tokenizers"},
    "kernels": set(),
    "modules": FOUNDATION | {"kernels"},
    "losses": FOUNDATION | {"modules", "kernels"},
    "adapters": FOUNDATION | {"modules", "weights", "kernels"},
    "dequantise": FOUNDATION | {"nf4_files", "packed_files", "weights"},
    "hub": FOUNDATION | {"dequantise", "hub_check", "hub_names", "modules", "weights", "staging"},
    "hub_check": FOUNDATION | {"hub_names", "weights"},
    "hub_names": FOUNDATION,
    "nf4_files": FOUNDATION | {"kernels", "weights"},
    "packed_files": FOUNDATION | {"weights"},
    "awq": {"modules"},
    "quantise": FOUNDATION
    | {"adapters", "awq", "dequantise", "hub", "models", "modules", "nf4_files", "tokenizers", "weights"},
    "tokenizers": FOUNDATION,
    "export": FOUNDATION | {"modules", "hub", "adapters", "tokenizers"},
    "models": FOUNDATION | {"dequantise", "modules", "hub", "hub_names", "tokenizers"},
    "data": FOUNDATION | {"losses", "tokenizers"},
    "training": FOUNDATION | {"modules", "losses", "weights", "adapters", "data"},
    "generation": FOUNDATION
    | {"modules", "tokenizers", "models", "adapters", "hub", "hub_names", "dequantise", "losses"},
    "rl": FOUNDATION
    | {"data", "generation", "losses", "modules", "tokenizers", "training", "adapters", "models", "hub"},
    "cli": FOUNDATION | {"vocabulary", "data", "generation", "modules", "tokenizers", "training"},
}
THIRD_PARTY = {
    "torch", "torchao", "torchdata", "safetensors", "huggingface_hub", "tiktoken", "sentencepiece", "omegaconf", "yaml",
    "jinja2", "datasets", "rich", "matplotlib", "pyarrow", "psutil", "triton",
    "wandb", "tensorboard", "mlflow",  # extras, imported by the logger that needs them
    "starlette", "uvicorn",  # extra: generation/server.py, cli/serve.py
    "lm_eval",  # extra: generation/lm_eval_model.py
}  # fmt: skip


def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "torchft").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    from sys import stdlib_module_names

    part = file.relative_to(ROOT / "torchft").parts[0].removesuffix(".py")
    if part == "__init__":
        return
    for name in imports(file):
        package, _, rest = name.partition(".")
        if package == "torchft":
            other = rest.split(".")[0]
            assert other == part or other in ALLOWED[part], f"{part} imports torchft.{rest}"
        else:
            assert package in THIRD_PARTY or package in stdlib_module_names, f"{file} imports {name}"


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.py")), ids=lambda f: f.name)
def test_recipes_import_only_torch_and_the_library(file: Path) -> None:
    from sys import stdlib_module_names

    for name in imports(file):
        assert name.split(".")[0] in {"torch", "torchft", *stdlib_module_names}, f"{file} imports {name}"


def test_functions_of_one_name_have_one_body_in_all_recipes() -> None:
    bodies: dict[str, tuple[str, str]] = {}
    for file in sorted((ROOT / "recipes").glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name not in ("main", "train", "build_model", "save"):
                body = ast.unparse(node)
                other, known = bodies.setdefault(node.name, (file.name, body))
                assert known == body, f"{node.name} differs between {other} and {file.name}"
