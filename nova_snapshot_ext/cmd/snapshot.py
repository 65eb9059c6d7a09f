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

"""``nova-snapshot``: snapshots of libvirt domains, with no Nova at all."""

import argparse
import collections.abc
import contextlib
import dataclasses
import datetime
from importlib import metadata
import json
import os
import sys
import time
import typing

import libvirt
import openstack
from openstack import exceptions as sdk_exceptions
from oslo_config import cfg
from oslo_log import log as logging
import tqdm

from nova_snapshot_ext import account as accounts
from nova_snapshot_ext import conf as confs
from nova_snapshot_ext import domain_records
from nova_snapshot_ext import domain_snapshot
from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext.images import base as images
from nova_snapshot_ext import own_disks
from nova_snapshot_ext import plugins
from nova_snapshot_ext import recovery
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import rights
from nova_snapshot_ext import rollback
from nova_snapshot_ext import selection
from nova_snapshot_ext import settings
from nova_snapshot_ext import snapshot

LOG = logging.getLogger(__name__)

FAILED = 1
USAGE = 2
REFUSED = 3
NO_DOMAIN = 4
BUSY = 5

_DESCRIPTION = """
Take snapshots of libvirt domains. It needs libvirt and a directory, and no
OpenStack.
"""
_EXIT_CODES = f"""
exit codes:
  0  it was done
  {FAILED}  it failed; the guest is as it was, or its guard sees to that
  {USAGE}  the command line is not valid
  {REFUSED}  refused before the guest was touched: no flow can serve, a value
     is not allowed, there is not enough room, it can not go back, or a
     snapshot can not be deleted as things are
  {NO_DOMAIN}  there is no such domain
  {BUSY}  another snapshot of the domain is in flight
"""
_PLAIN_LINE_S = 10.0


def _version() -> str:
    """As pbr told it from git when the package was built."""
    try:
        return metadata.version('nova-snapshot-ext')
    except metadata.PackageNotFoundError:
        return 'not installed'


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='nova-snapshot', description=_DESCRIPTION, epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--version', action='version',
                        version=f'%(prog)s {_version()}')
    parser.add_argument(
        '--connect', metavar='URI', default='qemu:///system',
        help="libvirt's URI (default: %(default)s)")
    parser.add_argument(
        '--config-file', metavar='FILE', action='append', default=[],
        help='read [snapshot_ext] from it, such as /etc/nova/nova.conf')
    parser.add_argument(
        '--debug', action='store_true', help='log what is done, in detail')
    commands = parser.add_subparsers(
        dest='command', required=True, metavar='COMMAND')
    create = commands.add_parser(
        'create', help='take a snapshot of a domain into an image')
    create.add_argument('--flow', metavar='NAME',
                        help='this flow, or none (default: the best that '
                             'can serve)')
    create.add_argument('--to', metavar='DIR|glance', required=True,
                        help='a directory, or Glance')
    create.add_argument('--cloud', metavar='NAME',
                        help='the cloud of clouds.yaml that --to glance '
                             'sends to')
    create.add_argument('--name', help="the image's name (default: the "
                        "domain's name and the time)")
    create.add_argument('--format', default='qcow2',
                        choices=['qcow2', 'raw', 'vmdk', 'vdi'],
                        help="the image's format (default: %(default)s)")
    create.add_argument('--compress', action='store_true',
                        help='compress a qcow2 image')
    create.add_argument('--quiesce', default='if possible',
                        choices=[each.value for each in requests.Quiesce],
                        help='freeze the file systems by the guest agent '
                             '(default: %(default)s)')
    create.add_argument('--no-memory', action='store_true',
                        help='have the flow domain keep the disks alone')
    create.add_argument('--external', action='store_true',
                        help='have the flow domain keep the snapshot in '
                             'files of its own, and the disk write into an '
                             'overlay')
    create.add_argument('--verify-hash', action='store_true',
                        help='compare the hash of what arrived')
    flows = commands.add_parser(
        'flows', help='say of each flow whether it can serve a domain')
    for command in (create, flows):
        command.add_argument('domain', metavar='DOMAIN',
                             help='name or UUID')
        command.add_argument(
            '--disks', choices=[each.value for each in requests.Disks],
            help='the root disk, or all that are not read-only and, where '
                 'Nova owns the domain, no volumes, at one instant and each '
                 'into an image of its own (default: [snapshot_ext] disks)')
        command.add_argument(
            '--staging', metavar='DIR',
            help='where image files may be written meanwhile (default: '
                 'TMPDIR or /var/tmp)')
        command.add_argument(
            '--force', action='store_true',
            help='stop a guest for a moment though Nova owns it; Nova may '
                 'then power it off for good')
        command.add_argument('--json', action='store_true',
                             help='print one JSON document')
    _add_domain_snapshots(commands)
    recover = commands.add_parser(
        'recover', help='undo what dead processes left of their snapshots')
    recover.add_argument('--dry-run', action='store_true',
                         help='say what would be undone, and do nothing')
    recover.add_argument(
        '--force', action='store_true',
        help='start guests that a snapshot stopped though Nova owns them')
    return parser


def _add_domain_snapshots(commands: typing.Any) -> None:
    tree = commands.add_parser(
        'tree', help='show the snapshots that a domain can go back to')
    revert = commands.add_parser(
        'revert', help='have a domain go back to a snapshot')
    delete = commands.add_parser(
        'delete', help="delete a snapshot from a domain's disks; its image "
                       "stays")
    for command in (tree, revert, delete):
        command.add_argument('domain', metavar='DOMAIN', help='name or UUID')
        command.add_argument('--json', action='store_true',
                             help='print one JSON document')
    for command in (revert, delete):
        command.add_argument(
            'snapshot', metavar='SNAPSHOT',
            help="its name, its title, or its image's id or path")
        command.add_argument(
            '--force', action='store_true',
            help='also of a domain that Nova owns')


def main(arguments: collections.abc.Sequence[str] | None = None) -> int:
    """The command. :returns: its exit code"""
    options = _parser().parse_args(arguments)
    # oslo.concurrency starts Python with -m: not from where we happen to be.
    os.environ['PYTHONSAFEPATH'] = '1'
    # libvirt prints errors by itself if it is let.
    libvirt.registerErrorHandler(lambda context, error: None, None)
    try:
        configuration = _configuration(options)
        if options.command == 'recover':
            return _recover(options, configuration)
        with _domain(options) as guest:
            return _COMMANDS[options.command](options, configuration, guest)
    except exception.GuestGone as error:
        return _fail(error, NO_DOMAIN)
    except exception.GuestBusy as error:
        return _fail(error, BUSY)
    except (exception.InvalidSetting, exception.NoFlowServes,
            exception.NotEnoughRoom, exception.UnsafeDisk,
            exception.RollbackRefused, exception.DeletionRefused) as error:
        return _fail(error, REFUSED)
    except (exception.SnapshotError, OSError) as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return _fail('it was interrupted', FAILED)
    except Exception as error:
        LOG.debug('It was not foreseen:', exc_info=True)
        return _fail(f'{type(error).__name__}: {exception.shown(error)} '
                     f'(not foreseen; --debug shows where)', FAILED)


def _fail(error: object, code: int) -> int:
    print(f'nova-snapshot: {error}', file=sys.stderr)
    return code


def _configuration(options: argparse.Namespace) -> typing.Any:
    configuration = cfg.ConfigOpts()
    confs.register_opts(configuration)
    logging.register_options(configuration)
    # Nova's, of which its state directory follows.
    configuration.register_opt(cfg.StrOpt('state_path'))
    try:
        configuration(
            [], project='nova-snapshot',
            default_config_files=options.config_file)
        options.state_path = configuration.state_path
    except cfg.Error as error:
        raise exception.InvalidSetting(
            '--config-file', ', '.join(options.config_file),
            str(error)) from error
    configuration.set_override('debug', options.debug)
    if options.debug:
        # oslo.log writes nowhere unless it is told to.
        configuration.set_override('use_stderr', True)
    else:
        logging.set_defaults(default_log_levels=['nova_snapshot_ext=WARN'])
    logging.setup(configuration, 'nova-snapshot')
    return configuration.snapshot_ext


@contextlib.contextmanager
def _domain(options: argparse.Namespace) -> typing.Iterator[guests.Guest]:
    try:
        connection = libvirt.open(options.connect)
    except libvirt.libvirtError as error:
        raise guests.LibvirtError(
            f'--connect {options.connect}', error) from error
    try:
        yield guests.Guest.find(
            connection, options.connect, options.domain)
    finally:
        connection.close()


def _request(options: argparse.Namespace, configuration: typing.Any,
             guest: guests.Guest) -> requests.Request:
    staging = os.path.abspath(
        options.staging or os.environ.get('TMPDIR')
        or '/var/tmp')  # nosec B108 # what is made there has its own directory
    return settings.request(
        configuration, staging, _state_directory_of(options, configuration),
        image_format=getattr(options, 'format', 'qcow2'),
        compress=getattr(options, 'compress', False),
        quiesce=requests.Quiesce(
            getattr(options, 'quiesce', requests.Quiesce.IF_POSSIBLE.value)),
        staging_setting='--staging',
        may_stop=options.force or not guest.belongs_to_nova(),
        disks=requests.Disks(options.disks) if options.disks else None,
        domain=requests.DomainSnapshot(
            memory=not getattr(options, 'no_memory', False),
            external=getattr(options, 'external', False),
            title=getattr(options, 'name', None) or _default_name(guest),
            most=configuration.max_domain_snapshots,
            most_gb=configuration.max_domain_snapshots_gb))


def _state_directory_of(options: argparse.Namespace,
                        configuration: typing.Any) -> str:
    if configuration.state_directory:
        return str(configuration.state_directory)
    if options.state_path:
        return _below(options.state_path)
    return _state_directory()


def _state_directory() -> str:
    """Nova's where there is one: its snapshots and ours exclude each other
    by the undo log's lock."""
    nova = '/var/lib/nova'
    if _is_ours_to_use(nova):
        return _below(nova)
    if os.geteuid() == 0:
        return '/var/lib/nova-snapshot-ext'
    return os.path.join(
        os.environ.get('XDG_STATE_HOME')
        or os.path.expanduser('~/.local/state'), 'nova-snapshot-ext')


def _is_ours_to_use(nova: str) -> bool:
    return os.access(nova, os.W_OK) and (
        os.geteuid() in (0, os.stat(nova).st_uid))


def _below(nova: str) -> str:
    """nova-compute's state directory, below Nova's ``state_path``."""
    path = os.path.join(nova, 'snapshot-ext')
    if _is_ours_to_use(nova) and not os.path.isdir(path):
        # Whoever makes it first, it is Nova's.
        rights.make_owners(path)
    return path


def _recover(options: argparse.Namespace, configuration: typing.Any) -> int:
    code = 0
    directory = _state_directory_of(options, configuration)
    for found in recovery.recover(directory, options.dry_run, options.force):
        words = f', {found.words}' if found.words else ''
        print(f'{found.path}: {found.outcome.value}{words}')
        for step in found.steps:
            print(f'  {step}')
        if found.outcome is recovery.Outcome.FAILED:
            code = FAILED
    return code


def _flows(options: argparse.Namespace, configuration: typing.Any,
           guest: guests.Guest) -> int:
    request = _request(options, configuration, guest)
    disks = tuple(
        each.disk for each in own_disks.chosen(guest, request.disks))
    found = {}
    for name in plugins.names(plugins.FLOWS):
        try:
            found[name] = plugins.load(
                plugins.FLOWS, name, 'installed flow')().obstacle(
                    guest, disks, request)
        except exception.UnsafeDisk as error:
            found[name] = str(error)
    if options.json:
        print(json.dumps({'domain': guest.name, 'flows': {
            name: {'serves': why is None, 'obstacle': why}
            for name, why in found.items()}}))
    else:
        for name, why in found.items():
            print(f'{name}: {"can serve" if why is None else why}')
    return 0


def _create(options: argparse.Namespace, configuration: typing.Any,
            guest: guests.Guest) -> int:
    if options.external and options.flow != 'domain':
        raise exception.InvalidSetting(
            '--flow', options.flow or '(none)',
            '--external is for --flow domain')
    names = configuration.flows if options.flow is None else [options.flow]
    wished = selection.Wish(
        tuple(names), '[snapshot_ext] flows' if options.flow is None
        else '--flow', options.flow is not None)
    service = _service(options)
    with _shown_progress(options) as progress:
        request = dataclasses.replace(
            _request(options, configuration, guest), progress=progress)
        host = recovery.host_for(guest, options.force)
        with accounts.told(request.account) as account:
            account.instance = guest.uuid
            planned = account.timed('plan', snapshot.plan)(
                guest, host, wished, configuration.transfers, request)
            result = snapshot.take(
                guest, host, planned, request, service,
                images.Description(
                    name=request.domain.title,
                    disk_format=options.format, container_format='bare',
                    properties={}),
                verify_hash=options.verify_hash)
    if options.json:
        print(json.dumps({
            'domain': guest.name, **dataclasses.asdict(result),
            'consistency': result.consistency.value}))
    else:
        print(f'{result.location}: {result.length} bytes, '
              f'flow {result.flow}, transfer {result.transfer}, '
              f'consistency {result.consistency.value}, guest paused '
              f'{result.guest_pause_s:.2f} s, {result.duration_s:.1f} s')
        if len(result.images) > 1:
            for image in result.images:
                print(f'  {image.device}: {image.location}, {image.length} '
                      f'bytes')
    return 0


def _default_name(guest: guests.Guest) -> str:
    now = datetime.datetime.now(datetime.UTC)
    return f'{guest.name}-{now:%Y%m%dT%H%M%SZ}'


def _service(options: argparse.Namespace) -> images.ImageService:
    if options.to != 'glance':
        destination = images.Destination(
            directory=os.path.abspath(options.to),
            directory_setting='--to')
        name = 'directory'
    else:
        try:
            glance = openstack.connect(cloud=options.cloud).image
        except sdk_exceptions.SDKException as error:
            raise exception.InvalidSetting(
                '--cloud', options.cloud, str(error)) from error
        destination = images.Destination(glance=glance, retries=3)
        name = 'glance'
    service: images.ImageService = plugins.load(
        plugins.IMAGE_SERVICES, name, '--to')(destination)
    return service


@contextlib.contextmanager
def _shown_progress(
        options: argparse.Namespace) -> typing.Iterator[requests.Progress]:
    """A bar on a terminal, a line now and then elsewhere, nothing beside
    JSON."""
    if options.json:
        yield requests.no_progress
    elif sys.stderr.isatty():
        with tqdm.tqdm(unit='B', unit_scale=True, leave=False) as bar:
            def draw(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)
            yield draw
    else:
        last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _PLAIN_LINE_S:
                last = time.monotonic()
                print(f'{done} of {total} bytes', file=sys.stderr)
        yield line


def _tree(options: argparse.Namespace, configuration: typing.Any,
          guest: guests.Guest) -> int:
    records = domain_records.Records(
        _state_directory_of(options, configuration), guest.uuid)
    current = records.current
    if options.json:
        print(json.dumps({
            'domain': guest.name, 'current': current, 'snapshots': [{
                'name': record.name, 'title': record.title,
                'parent': record.parent, 'image': record.image_id,
                'rollback': record.rollback.value,
                'external': record.external,
                'taken_at': record.taken_at} for record in records.all()]}))
    else:
        _draw(records.all(), current, None, '')
    return 0


def _draw(records: list[domain_records.Record], current: str | None,
          parent: str | None, indent: str) -> None:
    """Those that descend from one, the oldest first, and where it is now."""
    for record in records:
        if record.parent == parent:
            print(f'{indent}{record.title}: {record.rollback.value}, '
                  f'{"external, " * record.external}'
                  f'{record.taken_at[:19]}Z, '
                  f'{record.image_id or "no image"}')
            _draw(records, current, record.name, indent + '  ')
    if records and current == parent:
        print(f'{indent}(now)')


def _revert(options: argparse.Namespace, configuration: typing.Any,
            guest: guests.Guest) -> int:
    records, record = _chosen(options, configuration, guest)
    result = rollback.revert(
        guest, record, records, recovery.host_for(guest, options.force),
        configuration.freeze_timeout)
    _say(options, guest, record, 'went back to', {
        'rollback': result.rollback.value,
        'guest_pause_s': result.guest_pause_s})
    return 0


def _delete(options: argparse.Namespace, configuration: typing.Any,
            guest: guests.Guest) -> int:
    records, record = _chosen(options, configuration, guest)
    domain_snapshot.delete(
        guest, record, records, recovery.host_for(guest, options.force))
    _say(options, guest, record, 'does not have any more', {})
    return 0


def _chosen(options: argparse.Namespace, configuration: typing.Any,
            guest: guests.Guest,
            ) -> tuple[domain_records.Records, domain_records.Record]:
    """:raises RollbackRefused: if the domain is Nova's and nothing forces us

    :raises InvalidSetting: if it has no such snapshot
    """
    if guest.belongs_to_nova() and not options.force:
        raise exception.RollbackRefused(
            f'Nova owns {guest.name}: its snapshots are rolled back to by '
            f'"openstack server rebuild" and deleted with their images '
            f'(--force)')
    records = domain_records.Records(
        _state_directory_of(options, configuration), guest.uuid)
    record = records.find(options.snapshot)
    if record is None:
        known = ', '.join(each.title for each in records.all())
        raise exception.InvalidSetting(
            'SNAPSHOT', options.snapshot,
            f'{guest.name} has {known or "none"}')
    return records, record


def _say(options: argparse.Namespace, guest: guests.Guest,
         record: domain_records.Record, done: str,
         more: dict[str, typing.Any]) -> None:
    if options.json:
        print(json.dumps({'domain': guest.name, 'name': record.name,
                          'title': record.title, **more}))
    else:
        words = ''.join(f', {name} {value}' for name, value in more.items())
        print(f'{guest.name} {done} {record.title}{words}')


_COMMANDS = {'create': _create, 'flows': _flows, 'tree': _tree,
             'revert': _revert, 'delete': _delete}


if __name__ == '__main__':
    sys.exit(main())
