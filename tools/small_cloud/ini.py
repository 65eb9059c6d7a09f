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

"""Sections and options as text, the way that oslo.config reads them."""

from collections.abc import Mapping

Sections = Mapping[str, Mapping[str, object]]


def render(sections: Sections, comment: str = '') -> str:
    """One file; an option whose value is a list is written once for each."""
    lines = [f'# {comment}', ''] if comment else []
    for section, options in sections.items():
        if not options:
            continue
        lines.append(f'[{section}]')
        for name, value in options.items():
            values = value if isinstance(value, (list, tuple)) else [value]
            lines += [f'{name} = {v}' for v in values]
        lines.append('')
    return '\n'.join(lines)


def merge(*layers: Sections) -> dict[str, dict[str, object]]:
    """The layers as one; a later layer wins."""
    merged: dict[str, dict[str, object]] = {}
    for layer in layers:
        for section, options in layer.items():
            merged.setdefault(section, {}).update(options)
    return merged
