"""What a supervisor tells is printed in its order, and waits for nobody."""

import threading

from esper.supervision.notice import Notice
from esper.supervision.notice_printer import NoticePrinter


def test_while_nobody_reads_the_oldest_notices_go_and_are_counted() -> None:
    printed: list[str | None] = []
    begun, read = threading.Event(), threading.Event()

    def show(notice: Notice) -> None:
        begun.set()
        assert read.wait(30.0)
        printed.append(notice.text)

    printer = NoticePrinter(show, max_waiting=3)
    printer.tell(Notice(about="a", text="0"))
    assert begun.wait(30.0)
    for number in range(1, 8):
        printer.tell(Notice(about="a", text=str(number)))
    printer.close(limit_seconds=0.0)
    assert printed == []
    read.set()
    printer.close(limit_seconds=30.0)
    left_out = "4 notices are left out, as nobody read what is printed here"
    assert printed == ["0", left_out, "5", "6", "7"]
