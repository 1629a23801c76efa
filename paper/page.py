"""paper/README.md as one page for a browser, its pictures and films inside: paper/page.html
needs no network and is readable on a phone.

    pip install markdown && python -m paper.page
"""
import base64
import re

import markdown

from data import run_cli, write_whole
from paper.results import ROOT

STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60em; margin: auto; padding: 1em; color: #222 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5em; border-top: 1px solid #ccc }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .3em .7em; text-align: left }
pre { background: #f4f4f4; padding: .7em; overflow-x: auto; font-size: 13px }
img { max-width: 100%; image-rendering: pixelated }"""


def inside(match):
    """<img src="PATH"> with the picture itself; a path is from paper/."""
    kind = match[1].rsplit(".", 1)[-1]
    content = base64.b64encode((ROOT / "paper" / match[1]).read_bytes()).decode()
    return f'src="data:image/{kind};base64,{content}"'


def page_of(text):
    """Markdown -> an HTML page."""
    body = markdown.markdown(text, extensions=["tables", "fenced_code"])
    body = re.sub(r'src="([^":]+)"', inside, body)
    return ("<!doctype html><html lang=en><meta charset=utf-8>"
            "<meta name=viewport content='width=device-width'>"
            f"<title>Dreamer 4 in miniature</title><style>{STYLE}</style>{body}</html>\n")


def main():
    path = ROOT / "paper" / "page.html"
    text = page_of((ROOT / "paper" / "README.md").read_text())
    write_whole(path, lambda file: file.write(text.encode()))
    print(f"{path}: {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
