"""Write `listen.html`: held-out clips, original and reconstructed, side by side, playable offline."""

import argparse
import json
from collections.abc import Mapping
from html import escape
from itertools import groupby
from pathlib import Path

COLUMNS = {
    "trained-audio/original": "original",
    "trained-audio/all_levels": "trained from scratch",
    "trained-audio/half_levels": "trained from scratch, half of the levels",
    "mini-audio/all_levels": "recipes/cat_mini",
    "finetuned-audio/all_levels": "recipes/cat_mini, fine-tuned",
    "finetuned-audio/half_levels": "fine-tuned, half of the levels",
}
STYLE = """body { font-family: sans-serif; margin: 1em; } td, th { padding: .3em; text-align: left; }
td:first-child { max-width: 14em; overflow-wrap: anywhere; } audio { width: 8.5em; } img { max-width: 100%; }
th { font-weight: 600; } small { color: #555; }"""
EXPECT = """The model trained from scratch has only seen five minutes of audio: expect a noisy envelope with the right
rhythm, not words. The fine-tuned one had learned from 3.7 hours of three other voices before: expect speech."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the quickstart, with the report.md of compare.py")
    parser.add_argument("manifest", type=Path, help="held-out clips")
    arguments = parser.parse_args()
    entries = [json.loads(line) for line in arguments.manifest.read_text("utf-8").splitlines()]
    texts = {
        Path(entry["path"]).with_suffix("").as_posix().replace("/", "_"): entry.get("text", "") for entry in entries
    }
    report = arguments.out / "report.md"
    page = arguments.out / "listen.html"
    page.write_text(html(arguments.out, texts, report.read_text("utf-8") if report.is_file() else ""), "utf-8")
    print(page)


def html(out: Path, texts: Mapping[str, str], report: str) -> str:
    """Return the page.

    Args:
        out: folder of the quickstart; a missing folder leaves out its column, a missing file leaves its cell empty.
        texts: transcript or description by clip name, "" for a clip without text. Speech is shown first.
        report: Markdown from `compare.py`, "" for a page without distances.
    """
    columns = {folder: title for folder, title in COLUMNS.items() if (out / folder).is_dir()}
    rows = ["<tr><th>clip</th>" + "".join(f"<th>{escape(title)}</th>" for title in columns.values()) + "</tr>"]
    for name in sorted(texts, key=lambda name: not name.startswith("speech")):
        text = f"<br><small>{escape(texts[name])}</small>" if texts[name] else ""
        players = [
            f"<audio controls preload='none' src='{escape(folder)}/{escape(name)}.wav'></audio>"
            if (out / folder / f"{name}.wav").is_file()
            else ""
            for folder in columns
        ]
        rows.append(f"<tr><td>{escape(name)}{text}</td>{''.join(f'<td>{player}</td>' for player in players)}</tr>")
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>moss_train quickstart</title><style>{STYLE}"
    distances = f"<h2>Distances</h2><p>0 is identical to the original.</p>{tables(report)}" if report else ""
    picture = "<h2>Spectrograms</h2><img src='spectrogram.png' alt='spectrograms of a held-out sentence' width='900'>"
    clips = f"<h1>Held-out clips</h1><p>{EXPECT}</p><table>{''.join(rows)}</table>"
    return f"{head}</style>{clips}{distances}{picture}</html>\n"


def tables(markdown: str) -> str:
    """Convert Markdown with tables (each with a header row and a rule) and lines of text to HTML."""
    parts = []
    for is_table, lines in groupby(markdown.splitlines(), key=lambda line: line.startswith("|")):
        if not is_table:
            parts += [f"<p>{escape(line)}</p>" for line in lines if line]
            continue
        head, _, *body = ([escape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines)
        rows = ["".join(f"<th>{cell}</th>" for cell in head)]
        rows += ["".join(f"<td>{cell}</td>" for cell in cells) for cells in body]
        parts.append(f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
    return "".join(parts)


if __name__ == "__main__":
    main()
