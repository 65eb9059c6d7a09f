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

"""How a snapshot ended, as a versioned notification in the manner of Nova's.

Calls Nova, as driver.py does. [notifications] and
[oslo_messaging_notifications] say whether and where notifications go, as for
Nova's own. The objects are registered as Nova registers its own, which keeps
them out of the registry of what RPC understands; their namespace is ours, so
that nobody takes them for objects that Nova has defined.
"""

import typing

import nova.conf
from nova import context as nova_context
from nova.notifications.objects import base
from nova.objects import base as nova_base
from nova.objects import fields

from nova_snapshot_ext import account as accounts

CONF = nova.conf.CONF

NAMESPACE = 'nova_snapshot_ext'


def _field(name: str) -> typing.Any:
    """The field of a name of the account, which has its unit at its end."""
    if name.endswith('_s'):
        return fields.FloatField(nullable=True)
    if name == 'disks' or name.endswith(('_bytes', '_ms')):
        return fields.IntegerField(nullable=True)
    return fields.StringField(nullable=True)


@nova_base.NovaObjectRegistry.register_notification
class SnapshotExtPayload(base.NotificationPayloadBase):  # type: ignore[misc]
    """What the line of the log says, by the same names."""

    # Version 1.0: Initial version
    VERSION = '1.0'
    OBJ_PROJECT_NAMESPACE = NAMESPACE

    fields = {
        **{name: _field(name) for name in accounts.NAMES},
        'host': fields.StringField(),
        'project_id': fields.StringField(nullable=True),
        'user_id': fields.StringField(nullable=True),
    }

    def __init__(self, context: nova_context.RequestContext,
                 account: accounts.Account) -> None:
        super().__init__()
        for name, value in account.values().items():
            setattr(self, name, value)
        self.host = CONF.host
        self.project_id = context.project_id
        self.user_id = context.user_id


@nova_base.NovaObjectRegistry.register_notification
class SnapshotExtNotification(base.NotificationBase):  # type: ignore[misc]
    """``snapshot_ext.snapshot.end``, or ``.error`` if it failed."""

    # Version 1.0: Initial version
    VERSION = '1.0'
    OBJ_PROJECT_NAMESPACE = NAMESPACE

    fields = {'payload': fields.ObjectField('SnapshotExtPayload')}


def send(context: nova_context.RequestContext,
         account: accounts.Account) -> None:
    """Send it to whoever listens, if [notifications] wants any.

    :param context: of the request
    """
    failed = account.outcome == accounts.FAILED
    SnapshotExtNotification(
        priority=(fields.NotificationPriority.ERROR if failed
                  else fields.NotificationPriority.INFO),
        publisher=base.NotificationPublisher(
            host=CONF.host, source=fields.NotificationSource.COMPUTE),
        event_type=base.EventType(
            object='snapshot_ext',
            action=fields.NotificationAction.SNAPSHOT,
            phase=(fields.NotificationPhase.ERROR if failed
                   else fields.NotificationPhase.END)),
        payload=SnapshotExtPayload(context, account)).emit(context)
