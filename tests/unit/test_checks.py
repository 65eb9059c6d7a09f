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

import contextlib
import io
import json
import os
import subprocess
import sys
import types
import typing
from unittest import mock

import libvirt
import nova.conf
from oslo_upgradecheck import upgradecheck

from nova_snapshot_ext import checks
from nova_snapshot_ext.cmd import status
from nova_snapshot_ext import config_source
from nova_snapshot_ext import driver
from nova_snapshot_ext import exception
from nova_snapshot_ext import nova_compat
from nova_snapshot_ext import nova_interface
from tests.unit import base
from tests.unit import fakes
from tests.unit import nova_config

FAILURE = upgradecheck.Code.FAILURE
SUCCESS = upgradecheck.Code.SUCCESS
WARNING = upgradecheck.Code.WARNING


class ChecksTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.config = nova_config.use(self)
        self.conf = nova.conf.CONF

    def assertResult(self, code: upgradecheck.Code, words: str,
                     check: checks.Check) -> None:
        result = check(self.conf)
        self.assertEqual(code, result.code, result.details)
        self.assertRegex(result.details, words)


class TestLoading(ChecksTestCase):

    def test_driver_that_is_set(self) -> None:
        self.config(compute_driver=config_source.COMPUTE_DRIVER,
                    config_source=['snapshot_ext'])
        self.assertResult(SUCCESS, 'SnapshotLibvirtDriver', checks.loading)

    def test_other_driver(self) -> None:
        self.config(compute_driver='libvirt.LibvirtDriver',
                    config_source=['snapshot_ext'])
        self.assertResult(
            FAILURE, 'compute_driver is libvirt.LibvirtDriver: remove it',
            checks.loading)

    def test_source_that_is_missing(self) -> None:
        self.config(compute_driver=config_source.COMPUTE_DRIVER)
        self.assertResult(FAILURE, 'config_source', checks.loading)


class TestOptions(ChecksTestCase):

    def test_defaults(self) -> None:
        self.assertResult(SUCCESS, 'flows backup, live, cold',
                          checks.options)

    def test_every_wrong_name_is_said(self) -> None:
        self.config(flows=['warm'], transfers=['carried'],
                    group='snapshot_ext')
        self.assertResult(FAILURE, 'flows = warm .*transfers = carried ',
                          checks.options)

    def test_directory_without_one(self) -> None:
        self.config(image_service='directory', group='snapshot_ext')
        self.assertResult(FAILURE, 'image_directory', checks.options)

    def test_virt_type_that_is_not_served(self) -> None:
        self.config(virt_type='lxc', group='libvirt')
        self.assertResult(FAILURE, 'virt_type is lxc', checks.options)

    def test_compression_takes_the_stream_away(self) -> None:
        self.config(snapshot_compression=True, group='libvirt')
        self.assertResult(WARNING, 'staged serves', checks.options)

    def test_scratch_that_nothing_can_replace(self) -> None:
        self.config(on_scratch_full='live', group='snapshot_ext')
        self.config(disable_libvirt_livesnapshot=True, group='workarounds')
        self.assertResult(WARNING, 'on_scratch_full', checks.options)


class TestNova(ChecksTestCase):

    def test_installed_release_has_all_that_is_used(self) -> None:
        self.assertEqual([], list(nova_interface.differences()))
        self.assertIn(nova_interface.version(), (32, 33, 34))
        self.assertResult(
            SUCCESS, f'Nova {nova_interface.version()}$', checks.nova)

    def test_whatever_is_overridden_is_looked_at(self) -> None:
        ours = vars(driver.SnapshotLibvirtDriver)
        novas = nova_compat.LibvirtDriver
        self.assertEqual(
            {name for name in ours
             if callable(ours[name]) and hasattr(novas, name)},
            set(nova_interface._OVERRIDES))

    def test_release_that_was_not_tested(self) -> None:
        self.patch_name(
            'nova_snapshot_ext.nova_interface.version', lambda: 99)
        self.assertResult(WARNING, 'Nova 99 was not tested', checks.nova)

    def test_method_that_takes_more(self) -> None:
        def snapshot(self: object, context: object, instance: object,
                     image_id: str, update_task_state: object,
                     quickly: bool) -> None:
            pass

        with mock.patch('nova.virt.libvirt.driver.LibvirtDriver.snapshot',
                        snapshot):
            self.assertResult(FAILURE, 'LibvirtDriver.snapshot takes .*'
                              'quickly', checks.nova)

    def test_function_that_is_called_otherwise(self) -> None:
        with mock.patch('nova.utils.get_sdk_adapter',
                        lambda kind, ksa_auth: None):
            self.assertResult(FAILURE, 'nova.utils:get_sdk_adapter: .*admin',
                              checks.nova)

    def test_what_an_older_release_has_instead_is_looked_at(self) -> None:
        from nova import utils
        with mock.patch('nova.utils.get_sdk_adapter', lambda kind: None), \
                mock.patch('nova.utils._get_auth_and_session', None):
            del utils._get_auth_and_session
            self.assertResult(
                FAILURE, 'nova.utils:_get_auth_and_session is missing',
                checks.nova)

    def test_what_is_missing(self) -> None:
        from nova.compute import utils
        kept = utils.disk_ops_semaphore
        del utils.disk_ops_semaphore
        self.addCleanup(setattr, utils, 'disk_ops_semaphore', kept)
        self.assertResult(FAILURE, 'disk_ops_semaphore is missing',
                          checks.nova)

    def test_helper_of_privsep(self) -> None:
        self.assertEqual('sudo', nova_interface.root_helper(self.conf))
        self.config(helper_command='/opt/helper --fast',
                    group='nova_sys_admin')
        self.assertEqual('/opt/helper', nova_interface.root_helper(self.conf))


class TestHypervisor(ChecksTestCase):

    def versions(self, ours: int, qemu: int) -> None:
        connection = types.SimpleNamespace(
            getLibVersion=lambda: ours, getVersion=lambda: qemu,
            close=lambda: None)
        self.patch_name('nova_snapshot_ext.checks.libvirt.openReadOnly',
                        lambda uri: connection)

    def test_new_ones(self) -> None:
        self.versions(11003000, 10000002)
        self.assertResult(SUCCESS, r'libvirt 11\.3\.0, QEMU 10\.0\.2',
                          checks.hypervisor)

    def test_known_faults(self) -> None:
        self.versions(9010000, 8002000)
        self.assertResult(WARNING, r'^libvirt 9\.10\.0: other programs.*'
                          r'10\.8\.0\)$', checks.hypervisor)

    def test_too_old(self) -> None:
        self.versions(7000000, 5002000)
        self.assertResult(FAILURE, 'too old', checks.hypervisor)

    def test_libvirt_that_does_not_answer(self) -> None:
        def fail(uri: str) -> None:
            raise libvirt.libvirtError('no socket')

        self.patch_name(
            'nova_snapshot_ext.checks.libvirt.openReadOnly', fail)
        self.config(connection_uri='qemu+unix:///system', group='libvirt')
        self.assertResult(FAILURE, r'qemu\+unix:///system can not be asked: '
                          r'no socket', checks.hypervisor)


class TestHost(ChecksTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.config(snapshots_directory=self.staging, group='libvirt')
        self.config(state_directory=self.state, group='snapshot_ext')

    def test_programs(self) -> None:
        self.patch_name('nova_snapshot_ext.checks.shutil.which',
                        lambda name: None if name == 'qemu-nbd' else name)
        self.patch_name('nova_snapshot_ext.checks.mover_stream.why_not',
                        lambda python: None)
        self.assertResult(FAILURE, '^qemu-nbd can not be found',
                          checks.programs)

    def test_libnbd_that_is_missing(self) -> None:
        self.patch_name('nova_snapshot_ext.checks.shutil.which',
                        lambda name: name)
        self.config(mover_python='/nowhere/python', group='snapshot_ext')
        self.assertResult(WARNING, 'streamed can not serve: /nowhere/python',
                          checks.programs)

    def test_directories(self) -> None:
        self.patch_name('nova_snapshot_ext.checks.workspace.free_bytes',
                        lambda path: 2 ** 50)
        self.assertResult(SUCCESS, self.staging, checks.directories)

    def test_file_in_place_of_a_directory(self) -> None:
        path = self.new_file('file')
        self.config(scratch_directory=path, group='snapshot_ext')
        self.assertResult(FAILURE, f'scratch_directory = {path} ',
                          checks.directories)

    def test_path_that_is_not_absolute_has_an_end(self) -> None:
        self.config(scratch_directory='no/such', socket_directory='nor/this',
                    group='snapshot_ext')
        checks.directories(self.conf)

    def test_start_is_not_kept_up_by_a_check_that_breaks(self) -> None:
        def stale(path: str) -> int:
            raise OSError(116, 'Stale file handle')

        self.patch_name('nova_snapshot_ext.checks.workspace.free_bytes',
                        stale)
        checks.say_at_start(self.conf)
        self.assertIn('Directories: it could not be checked: OSError',
                      self.output.output)

    def test_room(self) -> None:
        self.patch_name('nova_snapshot_ext.checks.workspace.free_bytes',
                        lambda path: 1024)
        self.assertResult(FAILURE, 'no room for the 134217728 bytes',
                          checks.directories)

    def test_sockets_with_too_long_a_path(self) -> None:
        self.config(socket_directory='/' + 'x' * 100, group='snapshot_ext')
        self.assertResult(FAILURE, 'socket_directory', checks.directories)

    def test_rights_of_root_say_nothing(self) -> None:
        self.patch_name('nova_snapshot_ext.checks.os.geteuid', lambda: 0)
        self.assertResult(WARNING, "nova-compute's user", checks.rights)

    def test_privileged_helper_that_is_missing(self) -> None:
        self.patch_name('nova_snapshot_ext.checks.os.geteuid', lambda: 42)
        self.config(helper_command='/nowhere/helper',
                    group='nova_sys_admin')
        self.assertResult(FAILURE, '/nowhere/helper', checks.rights)

    def test_confinement(self) -> None:
        opened = mock.mock_open(read_data='Y\n')
        with mock.patch('builtins.open', opened):
            self.assertResult(WARNING, '^AppArmor is in force',
                              checks.confinement)


class TestGuests(ChecksTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.config(snapshots_directory=self.directory, group='libvirt')
        domains = [self.a_domain(name) for name in ('a', 'b', 'c')]
        connection = types.SimpleNamespace(
            listAllDomains=lambda: domains, close=lambda: None)
        self.patch_name('nova_snapshot_ext.checks.libvirt.open',
                        lambda uri: connection)

    def a_domain(self, name: str) -> typing.Any:
        return types.SimpleNamespace(UUIDString=lambda: f'uuid-{name}',
                                     name=lambda: name)

    def test_each_is_looked_at(self) -> None:
        def flow_of(conf: object, guest: typing.Any) -> str:
            if guest.name == 'b':
                raise exception.NoFlowServes(
                    '[snapshot_ext] flows', {'cold': 'it is a lie'})
            return 'backup' if guest.name == 'a' else 'cold'

        self.patch_name('nova_snapshot_ext.checks._flow_of', flow_of)
        self.assertResult(WARNING, '^b: .*it is a lie', checks.guests)

    def test_flows_that_would_serve(self) -> None:
        self.patch_name('nova_snapshot_ext.checks._flow_of',
                        lambda conf, guest: 'backup')
        self.assertResult(SUCCESS, '^backup would serve 3$', checks.guests)


class TestFlowOf(ChecksTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.config(snapshots_directory=self.directory, group='libvirt')
        self.config(state_directory=self.state, flows=['cold'],
                    group='snapshot_ext')
        self.domain.off()
        self.domain.disks = fakes.disk_xml(
            self.new_file('disk', bytes(4096))) + fakes.disk_xml(
                'pool/image', target='vdb', kind='network')

    def test_disks_that_would_be_asked_for_count(self) -> None:
        self.assertEqual('cold', checks._flow_of(self.conf, self.guest))
        self.config(disks='all', group='snapshot_ext')
        self.assertRaisesRegex(
            exception.NoFlowServes, 'vdb is a network disk',
            checks._flow_of, self.conf, self.guest)

    def test_directory_that_the_first_snapshot_makes(self) -> None:
        self.config(snapshots_directory=os.path.join(
            self.directory, 'snapshots'), group='libvirt')
        self.config(flows=['backup', 'cold'], group='snapshot_ext')
        self.domain.current_state = [
            libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_BOOTED]
        self.domain.disks = fakes.disk_xml(
            self.new_file('disk', bytes(4096)))
        self.assertEqual('backup', checks._flow_of(self.conf, self.guest))


class TestCommand(ChecksTestCase):

    def setUp(self) -> None:
        super().setUp()
        # It registers its command line with Nova's options, and for good.
        self.patch_name('nova_snapshot_ext.cmd.status.upgradecheck.main',
                        self.run_checks)
        self.checks: dict[str, checks.Check] = {}
        self.patch_name('nova_snapshot_ext.checks.ALL', self.checks)

    def run_checks(self, conf: object, project: str,
                   commands: upgradecheck.UpgradeCommands,
                   argv: list[str]) -> int:
        self.assertEqual(['upgrade', 'check', '--json'], argv)
        options = types.SimpleNamespace(
            command=types.SimpleNamespace(json=True))
        with mock.patch.object(upgradecheck, 'CONF', options):
            return int(commands.check())

    def command(self) -> tuple[int, list[typing.Any]]:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            code = status.main(['upgrade', 'check', '--json'])
        return code, json.loads(output.getvalue())['checks']

    def test_worst_result_is_the_exit_code(self) -> None:
        for number, code in enumerate((SUCCESS, WARNING, SUCCESS)):
            self.checks[str(number)] = (
                lambda conf, code=code: upgradecheck.Result(code, 'words'))
        code, found = self.command()
        self.assertEqual(1, code)
        self.assertEqual([0, 1, 0], [each['result'] for each in found])

    def test_check_that_breaks_does_not_hide_the_others(self) -> None:
        def broken(conf: object) -> upgradecheck.Result:
            raise OSError('no such thing')

        self.checks['broken'] = broken
        self.checks['sound'] = lambda conf: upgradecheck.Result(
            SUCCESS, 'well')
        code, found = self.command()
        self.assertEqual(2, code)
        self.assertEqual(
            ['it could not be checked: OSError: no such thing', 'well'],
            [each['details'] for each in found])

    def test_without_nova(self) -> None:
        errors = io.StringIO()
        with mock.patch.dict('sys.modules', {'nova': None}), \
                contextlib.redirect_stderr(errors):
            self.assertEqual(255, status.main(['upgrade', 'check']))
        self.assertIn('Nova is not installed', errors.getvalue())


class TestHelp(base.TestCase):

    def test_help_takes_no_nova(self) -> None:
        said = io.StringIO()
        with mock.patch.dict('sys.modules', {'nova': None}), \
                contextlib.redirect_stdout(said):
            ended = self.assertRaises(SystemExit, status.main, ['--help'])
        self.assertEqual(0, ended.code)
        self.assertIn('upgrade', said.getvalue())


class TestInstalled(base.TestCase):

    def test_fresh_process_finds_all_that_nova_has(self) -> None:
        # Where nothing but the command itself has imported Nova's objects.
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c',
             'from nova_snapshot_ext import nova_interface as found;'
             'print(list(found.differences()))'],
            capture_output=True, text=True, timeout=50)
        self.assertEqual(('[]\n', 0), (done.stdout, done.returncode),
                         done.stderr)
