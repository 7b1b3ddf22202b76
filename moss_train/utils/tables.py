"""Columns of tables that had another name: whatever reads a table takes both."""

RENAMED_COLUMNS = {
    "discriminator/real": "discriminator_score/real",
    "discriminator/generated": "discriminator_score/generated",
    "other_seconds": "callback_seconds",
    "text_nats": "text_lm_loss",
    "text_nats_blind": "text_lm_loss_no_audio",
    "text_correct": "text_accuracy",
    "alive": "active_fraction",
    "top_share": "max_probability",
}
"""Old name -> new name; those by number of levels, as `text_nats/8`, likewise."""


def present_column(name: str) -> str:
    """Return a column under its present name."""
    base, slash, levels = name.rpartition("/")
    if levels.isdigit():
        return f"{RENAMED_COLUMNS.get(base, base)}{slash}{levels}"
    return RENAMED_COLUMNS.get(name, name)
