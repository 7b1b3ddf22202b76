"""The final page of the quickstart: players, texts and distances, without any network resource."""

import json
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "recipes/quickstart/listen_page.py"
REPORT = "| mel distance | all |\n|---|---|\n| trained <b> | 2.62 |\n| silence | 7.66 |\n\ntrained / noise = 41.7%\n"


def page(out: Path) -> str:
    entries = [{"path": "sound/hiss.flac"}, {"path": "speech/one.flac", "text": "fish & chips"}]
    manifest = out / "heldout.jsonl"
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for file in (
        "trained-audio/original/speech_one",
        "trained-audio/original/sound_hiss",
        "mini-audio/all_levels/sound_hiss",
    ):
        path = out / f"{file}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    subprocess.run([sys.executable, SCRIPT, out, manifest], check=True, timeout=60, stdout=subprocess.DEVNULL)
    return (out / "listen.html").read_text("utf-8")


def rows(html: str) -> list[list[str]]:
    return [
        [re.sub(r"<audio.*src='(.*)'></audio>", r"\1", cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", html)
    ]


def test_every_player_stands_below_its_title_beside_the_clips_text(tmp_path):
    assert rows(page(tmp_path)) == [
        ["clip", "original", "recipes/cat_mini"],
        ["speech_one<br><small>fish &amp; chips</small>", "trained-audio/original/speech_one.wav", ""],
        ["sound_hiss", "trained-audio/original/sound_hiss.wav", "mini-audio/all_levels/sound_hiss.wav"],
    ]


def test_the_distances_of_the_report_and_what_to_expect_are_on_the_page(tmp_path):
    (tmp_path / "report.md").write_text(REPORT)
    html = page(tmp_path)
    assert rows(html)[3:] == [["mel distance", "all"], ["trained &lt;b&gt;", "2.62"], ["silence", "7.66"]]
    assert "<p>trained / noise = 41.7%</p>" in html
    assert "five minutes" in html
    assert "http" not in html
