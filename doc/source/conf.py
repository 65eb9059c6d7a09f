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

"""How the documentation is built."""

import pathlib
import sys
import typing

_DOC = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_DOC))

import import_graph  # noqa: E402

project = 'nova_snapshot_ext'
copyright = 'the nova-snapshot-ext developers'

extensions = [
    'openstackdocstheme',
    'oslo_config.sphinxext',
    'sphinx.ext.autodoc',
]

master_doc = 'index'
exclude_patterns: list[str] = []
nitpicky = False
pygments_style = 'native'

html_theme = 'openstackdocs'
openstackdocs_auto_name = False
openstackdocs_auto_version = False
openstackdocs_pdf_link = False
openstackdocs_bug_tag = ''

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'


def _draw(app: object) -> None:
    """Draw what imports what, of the source as it is."""
    found = import_graph.imports(_DOC.parent / import_graph.PACKAGE)
    (_DOC / 'source' / 'reference' / 'imports.svg').write_text(
        import_graph.svg(found))


def setup(app: typing.Any) -> None:
    app.connect('builder-inited', _draw)
