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

"""Running programs that must succeed."""

import pathlib
import subprocess

from benchmarks import errors


def run(*command: str | pathlib.Path) -> str:
    """:returns: what it printed

    :raises BenchmarkError: if it fails, with the end of what it said
    """
    words = [str(word) for word in command]
    # In a session of its own: Ctrl-C is ours to answer.
    done = subprocess.run(words, stdin=subprocess.DEVNULL, text=True,
                          capture_output=True, errors='replace',
                          start_new_session=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise errors.BenchmarkError(f'{" ".join(words)}: {said}')
    return done.stdout
