from moss_train.utils.files import pluralize


def test_one_is_no_plural():
    assert [pluralize(number, "clip") for number in (0, 1, 2, 2663)] == ["0 clips", "1 clip", "2 clips", "2,663 clips"]
