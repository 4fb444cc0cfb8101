"""The site builds strictly, relative links of every page of the repository lead somewhere, pictures are in place."""

import html.parser
import pathlib
import re
import subprocess
import sys
from urllib.parse import unquote, urlsplit

import markdown
import pytest
from pages import COMMANDS, PAGES, ROOT
from PIL import Image

LISTED = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"], cwd=ROOT, text=True,
                        capture_output=True).stdout.splitlines()
EVERY = sorted({ROOT / name for name in LISTED} | set(PAGES))
LARGEST = 300_000  # bytes of a picture
# Picture -> the page on which it stands, and words of the command that made it, on the same page.
PICTURES = {
    "quickstart.png": ("README.md", ("launch/quickstart.sh",)),
    "generators.png": ("recipes.md", ("python", "-m", "eqvae_jax.sample")),
    "transforms.png": ("how_it_works.md", ("python", "-m", "eqvae_jax.main", "--config=configs/eq_sdvae.py:fashion")),
    "latent_pca.png": ("how_it_works.md", ("python", "-m", "eqvae_jax.main", "--config=configs/eq_sdvae.py:fashion")),
    "spectrum.png": ("how_it_works.md", ("python", "-m", "eqvae_jax.main", "--config=configs/eq_sdvae.py:fashion")),
    "weak_scaling.png": ("planning.md", ("python", "benchmarks/plans.py")),
}


class Page(html.parser.HTMLParser):
    """The anchors of a page and what it links to, from its HTML."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(markdown.markdown(path.read_text(encoding="utf-8"), extensions=["toc", "fenced_code", "tables"]))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values[name] for name in ("href", "src") if values.get(name)]


def broken(path):
    """What is wrong with the links of a page, one sentence each; addresses of the network are not asked."""
    found = []
    for link in Page(path).links:
        parts = urlsplit(link)
        if parts.scheme in ("http", "https", "mailto"):
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if parts.path.startswith("/") or not target.is_relative_to(ROOT if path.is_relative_to(ROOT) else path.parent):
            found.append(f"{link} leads out of the repository")
        elif not target.exists():
            found.append(f"{link} leads nowhere")
        elif parts.fragment and (target.suffix != ".md" or parts.fragment not in Page(target).anchors):
            found.append(f"{link}: no such anchor")
    return found


def build(config, output):
    return subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", f"--config-file={config}",
                           f"--site-dir={output}"], capture_output=True, text=True)


def test_the_site_builds_strictly(tmp_path):
    ended = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert ended.returncode == 0, ended.stderr
    for page in (ROOT / "docs").glob("*.md"):
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert (tmp_path / "site" / name).is_file()


@pytest.mark.parametrize("text", ["[a](nowhere.md)", "[a](page.md#nowhere)", "![a](nowhere.png)"])
def test_a_link_that_leads_nowhere_ends_the_build(tmp_path, text):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("# Page\n")
    (tmp_path / "docs" / "index.md").write_text(f"# Home\n\n{text}\n")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = "nav:\n  - index.md\n  - page.md\n"
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"nav:\n(  - .*\n)+", nav, config, count=1))
    ended = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert ended.returncode != 0 and "nowhere" in ended.stderr


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_a_page(path):
    assert not broken(path)


def test_what_is_wrong_with_a_link_is_said(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One two\n\n[a](#one-two) [b](#three) [c](none.md) [d](../x.md) [e](https://f.g/h)\n\n"
                    "```sh\n[f](none.md)\n```\n")
    assert broken(page) == ["#three: no such anchor", "none.md leads nowhere", "../x.md leads out of the repository"]


def test_every_picture_is_small_and_stands_with_the_command_that_made_it():
    assert {path.name for path in (ROOT / "docs").glob("*.png")} == set(PICTURES)
    for name, (page, words) in PICTURES.items():
        path = ROOT / "docs" / name
        assert path.stat().st_size < LARGEST and min(Image.open(path).size) > 100
        made = [command for command in COMMANDS if command.page == page and command.words[: len(words)] == words]
        text = next(path for path in PAGES if path.name == page).read_text(encoding="utf-8")
        assert made and name in text


def test_the_readme_is_a_page_and_a_half():
    assert len(pathlib.Path(ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
