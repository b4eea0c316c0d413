import re
from pathlib import Path

PICTURES = Path(__file__).parents[1] / "notebooks" / "pictures"


def test_the_picture_shows_an_image_that_is_misread_and_pulls_of_which_one_kind_is_bounded(
    monkeypatch,
):
    monkeypatch.syspath_prepend(PICTURES)
    import opening

    figure = opening.draw(epochs=8)
    *images, pulls = figure.axes
    before, change, after = (axes.get_title() for axes in images)
    digit, other = (re.match(r"network: (\d) \(\d+%\)$", title) for title in (before, after))
    assert digit[1] != other[1]
    largest = float(re.findall(r"at most ([\d.]+)$", change)[0])
    clean, attacked = (axes.images[0].get_array() / 1.0 for axes in (images[0], images[2]))
    assert 0 < abs(attacked - clean).max() <= largest + 0.01
    msgd, engm = (line.get_ydata() for line in pulls.lines)
    assert len(msgd) == len(engm) == 50
    # the scale of the first step is the mean norm
    assert max(engm) <= msgd.mean() * 1.001 < max(msgd)
