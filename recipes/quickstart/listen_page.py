"""Write `listen.html`: held-out clips, original and reconstructed, side by side, playable without a network."""

import argparse
import json
from html import escape
from pathlib import Path

COLUMNS = {
    "trained-audio/original": "original",
    "trained-audio/all_levels": "trained from scratch",
    "trained-audio/half_levels": "trained from scratch, half of the levels",
    "mini-audio/all_levels": "recipes/cat_mini",
    "finetuned-audio/all_levels": "recipes/cat_mini, fine-tuned",
    "finetuned-audio/half_levels": "fine-tuned, half of the levels",
}
STYLE = """body { font-family: sans-serif; margin: 2em; } td, th { padding: .3em .4em; text-align: left; }
audio { width: 9em; } th { font-weight: 600; }"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the quickstart")
    parser.add_argument("manifest", type=Path, help="held-out clips")
    arguments = parser.parse_args()
    entries = [json.loads(line) for line in arguments.manifest.read_text("utf-8").splitlines()]
    names = [Path(entry["path"]).with_suffix("").as_posix().replace("/", "_") for entry in entries]
    page = arguments.out / "listen.html"
    page.write_text(html(arguments.out, sorted(names, key=lambda name: not name.startswith("speech"))), "utf-8")
    print(page)


def html(out: Path, names: list[str]) -> str:
    """Return the page; a clip or a column without files is left out."""
    columns = {folder: title for folder, title in COLUMNS.items() if (out / folder).is_dir()}
    rows = ["<tr><th>clip</th>" + "".join(f"<th>{escape(title)}</th>" for title in columns.values()) + "</tr>"]
    for name in names:
        players = [
            f"<td><audio controls preload='none' src='{escape(folder)}/{escape(name)}.wav'></audio></td>"
            for folder in columns
            if (out / folder / f"{name}.wav").is_file()
        ]
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(players)}</tr>")
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>moss_train quickstart</title><style>{STYLE}"
    picture = "<h2>Spectrograms</h2><img src='spectrogram.png' alt='spectrograms of a held-out sentence' width='900'>"
    return f"{head}</style><h1>Held-out clips</h1><table>{''.join(rows)}</table>{picture}</html>\n"


if __name__ == "__main__":
    main()
