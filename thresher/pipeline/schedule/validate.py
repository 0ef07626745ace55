"""Proves that a schedule trains what it should and cannot deadlock, or says which operation is wrong."""

from thresher.pipeline.schedule.checks import check_complete, check_fields, check_live, check_order
from thresher.pipeline.schedule.checks_exchange import check_exchanges
from thresher.pipeline.schedule.checks_transfers import check_transfers
from thresher.pipeline.schedule.graph import walk
from thresher.pipeline.schedule.ops import Schedule
from thresher.pipeline.schedule.orders import check_shape


def validate(schedule: Schedule, max_live: int | None = None) -> None:
    """Refuses a schedule that is wrong in any way.

    What passes has every operation once, on its rank; slices of a microbatch forward in order and back in reverse;
    every message sent once, received once before its use, in one order on both ends; sends waited for only where that
    cannot hang; bounded numbers of live slices and of messages that wait; exchanges on which both ranks agree; and an
    order in which all ranks together can execute it.

    Args:
        max_live: most slices that a rank may hold between forward and backward, counted per chunk; None for what the
            policy declares (:func:`~thresher.pipeline.schedule.orders.in_flight`).

    Raises:
        ScheduleError: the first fault, with rank, number in the list, and operation.
    """
    check_shape(schedule.shape)
    check_fields(schedule)
    index = check_complete(schedule)
    check_order(index)
    check_live(index, max_live)
    check_transfers(index)
    check_exchanges(index)
    walk(schedule)
