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

"""A table, as text, as reStructuredText and as CSV."""

import collections.abc
import csv
import dataclasses
import io

Row = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells of text below a header.

    :ivar name: of the files that it goes to
    """

    name: str
    title: str
    header: Row
    rows: collections.abc.Sequence[Row]

    def text(self) -> str:
        """For a terminal: columns of equal width."""
        widths = [max(map(len, column))
                  for column in zip(self.header, *self.rows)]
        lines = [self.title, '']
        for row in (self.header, tuple('-' * width for width in widths),
                    *self.rows):
            lines.append('  '.join(
                cell.ljust(width)
                for cell, width in zip(row, widths)).rstrip())
        return '\n'.join(lines) + '\n'

    def rst(self) -> str:
        """For the documentation."""
        lines = [f'.. list-table:: {self.title}', '   :header-rows: 1', '']
        for row in (self.header, *self.rows):
            for number, cell in enumerate(row):
                lines.append(f'   {" " if number else "*"} - {cell}'.rstrip())
        return '\n'.join(lines) + '\n'

    def csv(self) -> str:
        """For spreadsheets."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(self.header)
        writer.writerows(self.rows)
        return file.getvalue()
