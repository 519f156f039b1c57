"""Charts of long runs."""

from esper.report.chart import Chart
from esper.report.light_charts import MAX_POINTS, lightened


def chart(points: int) -> Chart:
    x = [None if index % 1000 == 999 else index for index in range(points)]
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": x,
        "y": x,
        "error_y": {"type": "data", "array": list(range(points))},
        "line": {"color": "red"},
    }
    bar = {"type": "bar", "x": list(range(points)), "y": [1] * points}
    return Chart(key="a", title="A", summary="All.", figure={"data": [line, bar], "layout": {}})


def test_long_line_is_drawn_in_few_points_with_its_ends_and_gaps() -> None:
    light = lightened(chart(12_000))
    line, bar = light.figure["data"]
    shown = [value for value in line["x"] if value is not None]
    assert len(shown) <= MAX_POINTS + 1
    assert (shown[0], shown[-1]) == (0, 11_998)
    assert line["x"].count(None) == 12
    assert line["y"] == line["x"]
    assert [error for error, x in zip(line["error_y"]["array"], line["x"], strict=True) if x] == [
        x for x in line["x"] if x
    ]
    assert line["line"] == {"color": "red"}
    assert len(bar["x"]) == 12_000
    assert light.summary == "All. One point in 20 of the longest line is shown."


def test_short_line_is_drawn_as_it_is() -> None:
    assert lightened(chart(MAX_POINTS)) == chart(MAX_POINTS)
