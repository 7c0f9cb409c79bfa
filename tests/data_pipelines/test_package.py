import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "data_pipelines"


def test_light_modules_do_not_import_tensorflow() -> None:
    program = (
        "import sys; import data_pipelines.batches.batch_plan, data_pipelines.store.token_store,"
        "data_pipelines.errors, data_pipelines.prepare, data_pipelines.sources.tfds,"
        "data_pipelines.sources.movie_reviews;"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_nothing_of_the_trainer_or_the_launcher_is_imported() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("trainer", "launch"), path
