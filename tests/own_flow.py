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

"""A package with a flow of its own: that of the contributor's guide."""

import pathlib
import shutil

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLOW = ROOT / 'doc' / 'source' / 'contributor' / 'off_flow.py'


def install(directory: pathlib.Path) -> None:
    """Have the flow ``off`` in a directory, as pip would install it.

    It is found where that directory is in ``sys.path``.
    """
    shutil.copy(FLOW, directory)
    metadata = directory / 'my_package-1.0.dist-info'
    metadata.mkdir()
    (metadata / 'METADATA').write_text(
        'Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n')
    (metadata / 'entry_points.txt').write_text(
        '[nova_snapshot_ext.flows]\noff = off_flow:OffFlow\n')
