"""Options that take several values: given twice, each command uses the values of both."""

import argparse
import importlib

import pytest

from s3prl_ekd.cli import COMMANDS


def options(parser):
    """``parser``'s options of one or more values, and those of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from options(subparser)
        elif action.option_strings and action.nargs == "+":
            yield parser, action


@pytest.mark.parametrize("command", COMMANDS)
def test_a_repeated_option_adds_to_its_values(command):
    parser = argparse.ArgumentParser(prog=command)
    importlib.import_module(f"s3prl_ekd.commands.{command.replace('-', '_')}").configure(parser)
    for owner, action in options(parser):
        namespace = argparse.Namespace(**{action.dest: action.default})
        for values in (["1", "2"], ["3"]):
            action(owner, namespace, values, action.option_strings[0])
        assert getattr(namespace, action.dest) == ["1", "2", "3"], action.option_strings
