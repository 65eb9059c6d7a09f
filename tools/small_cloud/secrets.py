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

"""The cloud's passwords: random, made once, in one file for root only."""

from collections.abc import Mapping
import json
import secrets

from small_cloud import state as cloud_state

NAMES = ('admin', 'service', 'database', 'rabbit', 'erlang_cookie')


def load(state: cloud_state.State) -> Mapping[str, str]:
    """The secrets by name; those that do not exist yet are made."""
    path = state.root / 'secrets.json'
    known = json.loads(path.read_text()) if path.exists() else {}
    missing = {
        name: secrets.token_hex(16) for name in NAMES if name not in known
    }
    if missing:
        known |= missing
        state.write(path, json.dumps(known, indent=1) + '\n', mode=0o600)
    return known
