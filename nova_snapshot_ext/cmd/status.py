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

"""``nova-snapshot-ext-status``: checks before a first start or an upgrade."""

import functools
import sys

from oslo_config import cfg
from oslo_upgradecheck import upgradecheck

from nova_snapshot_ext import conf as confs

#: when something failed that was not foreseen, as Nova's own command has it
_UNFORESEEN = 255


class Checks(upgradecheck.UpgradeCommands):
    """The checks, for oslo.upgradecheck to run."""

    display_title = 'nova_snapshot_ext on this host'

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        # Not sooner: it takes Nova, which may not be there.
        from nova_snapshot_ext import checks

        def made(check: 'checks.Check', commands: Checks,
                 ) -> upgradecheck.Result:
            return checks.checked(check, conf)

        # It passes itself to each.
        self._upgrade_checks = tuple(
            (name, functools.partial(made, check))
            for name, check in checks.ALL.items())


def main(arguments: list[str] | None = None) -> int:
    """The command: ``upgrade check [--json]``, and where nova.conf is.

    :returns: 0, or 1 where something deserves attention, 2 where the driver
        would not serve, 255 where the checks could not be made
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        from nova import conf as nova_conf
    except ImportError as error:
        if {'-h', '--help'}.intersection(given):
            return int(upgradecheck.main(
                cfg.ConfigOpts(), 'nova', upgradecheck.UpgradeCommands(),
                argv=given))
        print(f'nova-snapshot-ext-status: Nova is not installed in '
              f'{sys.executable}: {error}', file=sys.stderr)
        return _UNFORESEEN
    conf = nova_conf.CONF
    confs.register_opts(conf)
    try:
        return int(upgradecheck.main(
            conf, 'nova', Checks(conf), argv=given))
    except cfg.Error as error:
        print(f'nova-snapshot-ext-status: {error}', file=sys.stderr)
        return _UNFORESEEN


if __name__ == '__main__':
    sys.exit(main())
