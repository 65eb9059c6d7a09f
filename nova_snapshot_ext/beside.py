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

"""Something that is done again and again beside the work of a snapshot."""

import collections.abc
import contextlib
import threading

#: how long the end of a scope waits for what is being done, in seconds: it
#: may hang in the very thing that made the scope end
_END_TIMEOUT_S = 5.0


@contextlib.contextmanager
def repeated(look: collections.abc.Callable[[], bool], every_s: float,
             last: collections.abc.Callable[[], None] = lambda: None,
             ) -> collections.abc.Iterator[None]:
    """Have a thread do something until the scope ends.

    :param look: called again while it returns True; raises nothing
    :param every_s: seconds between two calls, and before the first
    :param last: called when the scope ends, by the same thread
    """
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every_s) and look():
            pass
        ended.wait()
        last()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_END_TIMEOUT_S)
