"""What a test does to logging ends with it."""

import logging

pytest_plugins = ("pytester",)


def test_levels_and_handlers_are_those_from_before(pytester, request):
    pytester.makeconftest((request.config.rootpath / "tests" / "conftest.py").read_text())
    # What open_clip's training script does with its log file.
    pytester.makepyfile("""
        import logging

        def test_script(tmp_path):
            for name in logging.root.manager.loggerDict:
                logging.getLogger(name).setLevel(logging.INFO)
            logging.root.setLevel(logging.DEBUG)
            logging.root.addHandler(logging.StreamHandler())
            logging.root.addHandler(logging.FileHandler(tmp_path / "log"))
    """)
    logger = logging.getLogger("fastvlp.parent_of_loggers.child")
    logger.setLevel(logging.ERROR)
    level, handlers = logging.root.level, list(logging.root.handlers)
    pytester.runpytest_inprocess("--import-mode=importlib").assert_outcomes(passed=1)
    assert (logger.level, logging.root.level) == (logging.ERROR, level)
    assert logging.getLogger("fastvlp.parent_of_loggers").level == logging.NOTSET
    assert logging.root.handlers == handlers
