"""House rules that a reader can rely on: imports point down, library code is silent, tests use public names only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("minillm_jax", "convert")

# The layers of the code from bottom to top: a module imports only from layers above its own in this list.
# A name is a folder of minillm_jax, a module of minillm_jax, or the package `convert`.
LAYERS = (
    "version",
    "errors",
    "paths",
    "hidden",
    "options",
    "progress",
    "demo",
    "settings",
    "model",
    "devices",
    "data",
    "evaluation",
    "scoring",
    "pruning",
    "budget",
    "recovery",
    "recipes",
    "convert",
    "stages",
    "plan_experts",
    "plan",
    "api",
    "recovering",
    "generating",
    "timing",
    "comparing",
    "run",
    "run_recovery",
    "report",
    "cli",
    "__main__",
)

# Layers that may not know each other, although one stands above the other in the list.
STRANGERS = {("pruning", "scoring"), ("convert", "scoring"), ("convert", "recipes"), ("convert", "budget")}

# The only places that print: the command lines and the benchmarks.
PRINTING = ("minillm_jax/cli/", "convert/__main__.py")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in sources(*PACKAGES)}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of every import of our packages, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield node.lineno, whole if whole in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def layer_of(module: str) -> str | None:
    """The layer of a module; None for another package, and for the public names of `minillm_jax` itself."""
    package, *rest = module.split(".")
    if package == "convert":
        return "convert"
    return rest[0] if package == "minillm_jax" and rest else None


def test_every_module_has_a_layer() -> None:
    layers = {layer_of(module) for module in MODULES} - {None}
    assert layers == set(LAYERS)


def test_imports_point_down() -> None:
    wrong = []
    for path in sources(*PACKAGES):
        above = layer_of(module_of(path))
        if above is None:
            continue  # minillm_jax/__init__.py stands above all layers
        for line, module in imports(ast.parse(path.read_text())):
            below = layer_of(module)
            if below is None:
                if module == "minillm_jax":
                    wrong.append(f"{relative(path)}:{line} imports the public names of minillm_jax")
                continue
            upward = below != above and LAYERS.index(below) >= LAYERS.index(above)
            if upward or (above, below) in STRANGERS or (below, above) in STRANGERS:
                wrong.append(f"{relative(path)}:{line} {above} imports {module}")
    assert wrong == []


def test_library_code_does_not_print() -> None:
    wrong = [
        f"{relative(path)}:{node.lineno} {ast.unparse(node)}"
        for path in sources(*PACKAGES)
        if not relative(path).startswith(PRINTING)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.exit")
    ]
    assert wrong == []


def caught(handler: ast.ExceptHandler) -> set[str]:
    """The names of the exceptions that a handler catches."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(kind) for kind in kinds if kind is not None}


def test_sentences_are_not_wrapped_in_sentences() -> None:
    """`InputError` is a ValueError: a handler of ValueError would wrap it in another one."""
    wrong = []
    for path in sources(*PACKAGES):
        for node in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Try)):
            raised = [ast.unparse(one) for part in node.body for one in ast.walk(part) if isinstance(one, ast.Raise)]
            kinds = [caught(handler) for handler in node.handlers]
            first = next((kind for kind in kinds if kind & {"InputError", "ValueError", "Exception"}), set())
            if any(text.startswith("raise InputError") for text in raised) and first & {"ValueError", "Exception"}:
                wrong.append(f"{relative(path)}:{node.lineno}")
    assert wrong == []


def test_settings_and_recipes_import_nothing_heavy() -> None:
    """The command line reads them for `--help`."""
    light = {"errors", "options", "paths", "progress", "recipes", "settings", "version", "cli"}
    for name in ("settings", "options", "errors", "recipes/recipe", "cli/flags", "cli/__init__"):
        path = ROOT / "minillm_jax" / f"{name}.py"
        tree = ast.parse(path.read_text())
        assert {layer_of(module) for _, module in imports(tree)} - {None} <= light
        names = {module.split(".")[0] for _, module in imports(tree)}
        assert not names & {"jax", "numpy", "transformers", "flax", "torch", "convert"}, name


# ---------------------------------------------------------------------------------------- tests by public names


# The public methods of named tuples, whose names begin with an underscore.
NAMED_TUPLE = ("_fields", "_replace", "_asdict", "_make")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE


def names_of_ours(tree: ast.AST) -> set[str]:
    """The names in a test that are bound to our packages, modules, classes and functions."""
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.split(".")[0] in PACKAGES]
            bound |= {alias.asname or alias.name.split(".")[0] for alias in ours}
    return bound


def root_of(node: ast.expr) -> str | None:
    """The first name of `a.b.c`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def breaches(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every private name of ours that a test uses, and of every attribute of ours that it patches."""
    ours = names_of_ours(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
            parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, f"imports {name}") for name in parts if is_private(name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and root_of(node) in ours:
            yield node.lineno, f"uses {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and is_patch(node) and patches_ours(node, ours):
            yield node.lineno, f"patches {ast.unparse(node)}"
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Attribute) and root_of(target) in ours:
                    yield node.lineno, f"assigns {ast.unparse(target)}"


def is_patch(call: ast.Call) -> bool:
    """Whether a call is `setattr`, `delattr`, `monkeypatch.setattr`, `mock.patch` or `mock.patch.object`."""
    words = ast.unparse(call.func).split(".")
    return words[-1] in ("setattr", "delattr", "patch") or words[-2:] == ["patch", "object"]


def patches_ours(call: ast.Call, ours: set[str]) -> bool:
    if not call.args:
        return False
    target = call.args[0]
    if isinstance(target, ast.Constant):
        return str(target.value).split(".")[0] in PACKAGES
    return root_of(target) in ours


def test_tests_use_public_names_and_patch_nothing_of_ours() -> None:
    wrong = [
        f"{relative(path)}:{line} {what}"
        for path in sources("tests")
        for line, what in breaches(ast.parse(path.read_text()))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ("from minillm_jax.api import _load", "imports _load"),
        ("from minillm_jax._api import load", "imports _api"),
        ("from minillm_jax import api\napi._load()", "uses api._load"),
        ("import minillm_jax.api as a\na.load._cache", "uses a.load._cache"),
        ("from minillm_jax import api\nmonkeypatch.setattr(api, 'load', None)", "patches"),
        ("monkeypatch.setattr('minillm_jax.api.load', None)", "patches"),
        ("monkeypatch.setattr('convert.writer.save_file', None)", "patches"),
        ("import convert.writer\nmock.patch.object(convert.writer, 'save')", "patches"),
        ("from minillm_jax.model import loss\nloss.CHUNK = 3", "assigns loss.CHUNK"),
        ("import sys\nmonkeypatch.setattr(sys, 'argv', [])", None),
        ("from minillm_jax import api\napi.load.__doc__", None),
        ("monkeypatch.setattr('huggingface_hub.snapshot_download', None)", None),
    ],
)
def test_breaches_are_found(test: str, expected: str | None) -> None:
    texts = [what for _, what in breaches(ast.parse(test))]
    assert bool(texts) == (expected is not None)
    assert all(text.startswith(expected or "") for text in texts)


def test_every_slow_test_exists() -> None:
    for line in (ROOT / "tests" / "slow.txt").read_text().splitlines():
        if not line.startswith("#"):
            path, _, name = line.partition("::")
            assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), line
