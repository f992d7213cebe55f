"""nbval compares what a notebook printed; warnings on stderr differ from machine to machine and are left out."""


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # a notebook under nbval
        collector.skip_compare += ("stderr",)
