"""The `export` verb."""

from typing import Any

from moss_train.export import export

SUMMARY = "Write a trained tokenizer as a Hugging Face model folder."


def run(config: dict[str, Any]) -> int:
    """Export and say where. Returns 0."""
    folder = export(config["checkpoint"], config["out"], config["dtype"])
    print(f"wrote {folder}: AutoModel.from_pretrained('{folder}', trust_remote_code=True) loads it")
    return 0
