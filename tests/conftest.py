"""Set-up shared by all tests."""

import hypothesis

# On a loaded machine the time of a single example says nothing; pytest-timeout bounds each test.
hypothesis.settings.register_profile("thresher", deadline=None)
hypothesis.settings.load_profile("thresher")
