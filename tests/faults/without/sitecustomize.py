# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""Python starts with this where one undo is taken out.

It is found by PYTHONPATH, which every Python that a snapshot starts gets: the
command line, its guard, and recovery. There the undo that the environment
names is registered as one that does nothing.
"""

import collections.abc
import functools
import os
import typing

VARIABLE = 'NOVA_SNAPSHOT_EXT_WITHOUT_UNDO'
_NAME = os.environ.get(VARIABLE)

Step = collections.abc.Callable[..., None]


def _take_out(name: str) -> None:
    from nova_snapshot_ext import undo

    register = undo.step

    def registering(function: Step) -> Step:
        if function.__name__ != name:
            return register(function)

        @functools.wraps(function)
        def nothing(*_arguments: typing.Any, **_more: typing.Any) -> None:
            pass
        return register(nothing)

    undo.step = registering


if _NAME:
    _take_out(_NAME)
