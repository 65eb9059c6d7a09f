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

"""The settings that documents name, against Nova's options and ours."""

import re
import typing

import nova.conf
from oslo_config import cfg
from oslo_messaging import opts as messaging

from nova_snapshot_ext import conf as confs
from tests import documents
from tests.unit import base
from tests.unit import nova_config

#: what is no document
SAMPLES = ('etc/nova-compute.snapshot_ext.conf',
           'devstack/local.conf.sample')
#: sections of setup.cfg and of kolla-build.conf
OTHERS = ('entry_points', 'nova-compute-plugin-nova-snapshot-ext')
#: oslo.config's own: in [DEFAULT], and in a group that a source is made of
SOURCE = {('DEFAULT', 'config_source'), ('snapshot_ext', 'driver')}

Setting = tuple[str, str, str | None]


def settings_in(text: str) -> list[Setting]:
    """What a snippet sets: group, option, value."""
    found: list[Setting] = []
    group = None
    for line in text.splitlines():
        if line.startswith('['):
            group = line.strip('[]')
        elif group is not None and re.match(r'\w+ = ', line):
            name, _, value = line.partition(' = ')
            found.append((group, name, value))
    return found


class TestSettings(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        nova_config.use(self)
        for group, options in messaging.list_opts():
            if group == 'oslo_messaging_notifications':
                nova.conf.CONF.register_opts(options, group)

    def wrong(self, group: str, name: str, value: str | None) -> str | None:
        """Why there is no such setting; None if there is."""
        if (group, name) in SOURCE:
            return None if value in (None, 'snapshot_ext') else 'another one'
        known = typing.cast(
            typing.Any, nova.conf.CONF if group == 'DEFAULT'
            else nova.conf.CONF[group])
        if name not in known:
            return 'no such option'
        if group == 'snapshot_ext' and value is not None:
            [option] = (each for each in confs.OPTS if each.dest == name)
            try:
                option.type(value)
            except ValueError as error:
                return str(error)
        return None

    def assert_right(self, found: list[tuple[str, Setting]]) -> None:
        faults = []
        for where, setting in found:
            try:
                why = self.wrong(*setting)
            except cfg.NoSuchOptError as error:
                why = str(error)
            if why is not None:
                faults.append(f'{where}: {setting}: {why}')
        self.assertEqual([], faults)

    def test_each_snippet_is_understood(self) -> None:
        snippets = [(name, documents.read(name)) for name in SAMPLES]
        for language in ('', 'ini'):
            snippets += documents.blocks(language)
        found = [(where, setting) for where, text in snippets
                 for setting in settings_in(text)
                 if setting[0] not in OTHERS]
        self.assertGreater(len(found), 10)
        self.assert_right(found)

    def test_each_option_that_is_named_with_its_group_is_there(self) -> None:
        found: list[tuple[str, Setting]] = []
        for where, literal in documents.literals():
            named = re.fullmatch(
                r'\[([a-z_]+|DEFAULT)\] (\w+)(?: = (.+))?', literal)
            if named:
                found.append((where, (named[1], named[2], named[3])))
        self.assertGreater(len(found), 20)
        self.assert_right(found)

    def test_options_of_ours_that_are_set_or_referred_to_are_there(
            self) -> None:
        ours = {option.dest for option in confs.OPTS}
        found: list[tuple[str, Setting]] = []
        for name in documents.names():
            found += [
                (name, ('snapshot_ext', option, None))
                for option in re.findall(
                    r':oslo\.config:option:`[^`]*snapshot_ext\.(\w+)>?`',
                    documents.read(name))]
        for where, literal in documents.literals():
            option, equals, value = literal.partition(' = ')
            if equals and option in ours:
                found.append((where, ('snapshot_ext', option, value)))
        self.assertGreater(len(found), 60)
        self.assert_right(found)

    def test_time_limits_and_directories_are_options(self) -> None:
        everybody = {
            *nova.conf.CONF, *(name for group in nova.conf.CONF
                               if isinstance(nova.conf.CONF[group],
                                             cfg.ConfigOpts.GroupAttr)
                               for name in nova.conf.CONF[group])}
        named = {literal for _, literal in documents.literals()
                 if re.fullmatch(r'[a-z_]+_(timeout|directory|snapshots|gb)',
                                 literal)}
        self.assertGreater(len(named), 10)
        self.assertEqual(set(), named - everybody)

    def test_what_is_wrong_is_found(self) -> None:
        for setting in (('DEFAULT', 'config_source', 'snapshots'),
                        ('libvirt', 'snapshot_directory', None),
                        ('snapshot_ext', 'guest_share', '100'),
                        ('snapshot_ext', 'verify', 'bytes')):
            self.assertIsNotNone(self.wrong(*setting), setting)
