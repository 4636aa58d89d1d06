"""The progress bar of work that takes long. It is shown on a terminal only."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


class ProgressBar(Progress):
    """A context manager.

    Args:
        columns: shown between the count and the time left.
        visible: whether this process shows anything.
        transient: whether the bar disappears at its end.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        total: int,
        *columns: ProgressColumn,
        visible: bool = True,
        transient: bool = False,
    ):
        super().__init__(
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *columns, TimeRemainingColumn()),
            console=console,
            disable=not (visible and console.is_terminal),
            transient=transient,
        )
        self.title, self.total, self.visible = title, total, visible
        self._task = self.add_task(title, total=total, status="")

    def advance_to(self, done: int, status: str = "") -> None:
        self.update(self._task, completed=done, status=status)

    def note(self, text: str) -> None:
        """Prints a line that stays, above the bar."""
        if self.visible:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
