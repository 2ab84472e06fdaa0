"""What the README tells a reader to type does what it says."""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import ShuffleNetV2, shufflenet_v2_x0_5

README = Path(__file__).parent.parent / "README.md"


CONTRIBUTING = README.parent / "CONTRIBUTING.md"


@pytest.mark.parametrize(
    ("title", "name", "count"),
    [("Write an algorithm", "average", 2), ("Write a rule", "median", 1)],
)
def test_the_worked_examples_run(title: str, name: str, count: int, tmp_path: Path) -> None:
    text = CONTRIBUTING.read_text(encoding="utf-8") + "\n## "
    section = re.search(rf"^## {title}\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    assert section is not None
    example = section[1]
    blocks = re.findall(r"```(\w+)\n(.*?)```", example, re.DOTALL)
    (code,) = [body for kind, body in blocks if kind == "python"]
    (yaml,) = [body for kind, body in blocks if kind == "yaml"]
    (commands,) = [body for kind, body in blocks if kind == "bash"]
    (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "my_conf" / "method").mkdir(parents=True)
    (tmp_path / "my_conf" / "method" / f"{name}.yaml").write_text(yaml)
    lines = [line for line in commands.splitlines() if line]
    assert len(lines) == count
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "FUSION_CACHE": str(tmp_path / "cache"),
    }
    for number, line in enumerate(lines):
        folder = tmp_path / str(number)
        words = [*shlex.split(line), "fast_dev_run=true", f"output_path={folder}"]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (folder / "merged.safetensors").is_file()
        assert name.capitalize() in (folder / "config.yaml").read_text()
    if name == "median":
        written = [
            f"{len([x for x in t.splitlines() if x])} {of}"
            for t, of in ((code, "lines of Python"), (yaml, "of YAML"))
        ]
        assert all(words in text for words in written), written


def test_the_example_of_two_checkpoints_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    """The README's own lines, on small images of few classes and a small network."""
    text = README.read_text(encoding="utf-8")
    code = next(body for body in re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    for written, here in {
        "models.resnet18": "models.shufflenet_v2_x0_5",
        "(37)": "(2)",
        "(102)": "(3)",
        "=224": "=32",
        "=256": "=36",
    }.items():
        assert written in code
        code = code.replace(written, here)
    torch.save(shufflenet_v2_x0_5().state_dict(), tmp_path / "base.pth")
    torch.save(shufflenet_v2_x0_5(num_classes=2).state_dict(), tmp_path / "pets.pth")
    save_file(shufflenet_v2_x0_5(num_classes=3).state_dict(), tmp_path / "flowers.safetensors")
    generator = torch.Generator().manual_seed(0)
    for task, classes in {"pets": 2, "flowers": 3}.items():
        for number in range(classes):
            folder = tmp_path / task / "train" / f"class{number}"
            folder.mkdir(parents=True)
            for image in range(4):
                pixels = torch.randint(256, (40, 44, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{image}.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"images": torch.rand(2, 3, 32, 32)}
    exec(compile(code, "README.md", "exec"), names)
    assert "('pets', 'flowers')" in capsys.readouterr().out
    logits, plain = names["logits"], names["plain"]
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 2)
    assert type(plain) is ShuffleNetV2


def test_links_lead_somewhere() -> None:
    pages = [README, *(README.parent / "docs").glob("*.md"), README.parent / "CONTRIBUTING.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_summary_is_that_of_the_published_benchmark() -> None:
    docs = README.parent / "docs"
    published = (docs / "benchmark_results.md").read_text(encoding="utf-8")
    overview = re.search(r"^\| method \| needs \| score .*?\n\n", published, re.S | re.M)
    assert overview is not None
    assert overview[0].strip() in README.read_text(encoding="utf-8")
    with (docs / "_static" / "benchmark" / "benchmark.csv").open(encoding="utf-8") as file:
        settings = {row["setting"] for row in csv.DictReader(file)}
    assert {f"## {setting}" for setting in settings} <= set(published.splitlines())
