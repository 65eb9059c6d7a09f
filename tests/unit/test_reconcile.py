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

"""What a dead nova-compute left in Nova and in Glance is seen to."""

import os
import threading
import typing

import fixtures
from nova.compute import task_states
from nova import context as nova_context
from nova import exception as nova_exception
from nova import objects
from oslo_config import cfg

from nova_snapshot_ext import account as accounts
from nova_snapshot_ext import conf
from nova_snapshot_ext import exception
from nova_snapshot_ext import in_flight
from nova_snapshot_ext import reconcile
from tests.unit import base
from tests.unit import fakes
from tests.unit import nova_config

objects.register_all()


class ReconcileTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.config = nova_config.use(self)
        self.instance = objects.Instance(
            uuid=fakes.UUID, id=1, host='compute-1',
            task_state=task_states.IMAGE_BACKUP)
        self.saves: list[object] = []
        self.patch_name(
            'nova.objects.Instance.save',
            lambda instance, expected_task_state: self.saves.append(
                (expected_task_state, instance.task_state)))
        self.told: list[str] = []
        self.contexts: list[nova_context.RequestContext] = []
        self.tell_error: Exception | None = None
        self.patch_name(
            'nova.objects.InstanceActionEvent.event_finish_with_failure',
            lambda kind, *what, **more: self.tell(*what, **more))
        self.answers: list[str | Exception] = ['image-1 is deleted']
        self.settled: list[tuple[typing.Any, ...]] = []
        self.patch_name('nova_snapshot_ext.images.dead.settle', self.settle)
        self.patch_name('nova_snapshot_ext.reconcile.glance',
                        lambda: 'proxy')
        self.whole = False
        self.patch_name('nova_snapshot_ext.images.dead.is_whole',
                        lambda proxy, snapshot, announced: self.whole)
        self.further: list[tuple[str, bool, bool]] = []
        self.further_errors: list[Exception] = []
        self.patch_name('nova_snapshot_ext.images.dead.settle_further',
                        self.settle_further)
        self.patch_name('nova_snapshot_ext.notification.send',
                        lambda *what: None)
        self.now = 0.0
        self.patch_name('time.monotonic', lambda: self.now)
        self.waits: list[float] = []
        self.patch_name('time.sleep', self.wait)
        self.patch_name('threading.Thread.start', threading.Thread.run)

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def tell(self, context: nova_context.RequestContext, uuid: str,
             name: str, exc_val: str, exc_tb: str,
             want_result: bool) -> None:
        # None would be the success of the action.
        self.assertIsNotNone(exc_tb)
        self.assertEqual((fakes.UUID, reconcile.EVENT), (uuid, name))
        self.contexts.append(context)
        if self.tell_error is not None:
            raise self.tell_error
        self.told.append(exc_val)

    def settle(self, *arguments: typing.Any, patient: bool) -> str:
        self.settled.append((*arguments, patient))
        answer = (self.answers.pop(0) if len(self.answers) > 1
                  else self.answers[0])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def settle_further(
            self, proxy: object, snapshot: in_flight.Snapshot,
            image_id: str, whole: bool, failed: bool) -> str:
        if self.further_errors:
            raise self.further_errors.pop(0)
        self.further.append((image_id, whole, failed))
        return f'{image_id} is settled'

    def leave(self, task_state: str | None = None, *lengths: int,
              failure: str | None = None,
              further: tuple[str, ...] = ()) -> in_flight.Record:
        record = in_flight.Record.begin(self.state, in_flight.Snapshot(
            'image-1', fakes.UUID, 'project', 'user', 'req-1', task_state))
        for length in lengths:
            record.announce(length)
        for image_id in further:
            record.begin_further(image_id)
        if failure is not None:
            error = exception.SnapshotError(failure)
            with fixtures.MonkeyPatch('threading.Timer.start',
                                      lambda timer: None):
                record.__exit__(type(error), error, None)
        record.close()
        return record

    def after_death(self, *instances: objects.Instance) -> None:
        reconcile.after_death(self.state, list(instances))


class TestTaskState(ReconcileTestCase):

    def free(self, was: str, now: str | None) -> str | None:
        self.leave(was)
        self.instance.task_state = now
        self.after_death(self.instance)
        return typing.cast(str | None, self.instance.task_state)

    def test_what_nova_would_keep_for_ever_is_cleared(self) -> None:
        for was, now in (
                ('image_backup', 'image_backup'),
                ('shelving', 'shelving'),
                ('shelving', 'shelving_image_pending_upload'),
                ('shelving', 'shelving_image_uploading')):
            self.saves.clear()
            self.assertIsNone(self.free(was, now))
            self.assertEqual([(now, None)], self.saves)

    def test_what_nova_sees_to_is_left_to_nova(self) -> None:
        for was, now in (
                ('image_snapshot', 'image_uploading'),
                ('image_backup', 'image_uploading'),
                ('resize_migrating', 'resize_migrating'),
                ('image_snapshot', 'deleting'),
                ('image_backup', None)):
            self.assertEqual(now, self.free(was, now))
        self.assertEqual([], self.saves)

    def test_request_that_still_waits_in_the_queue_keeps_its_state(
            self) -> None:
        # It was taken after the one that was cut off.
        self.assertEqual('image_backup', self.free(
            'image_snapshot', 'image_backup'))
        self.assertEqual('image_backup', self.free(
            'shelving', 'image_backup'))

    def test_server_that_is_not_here_any_more_is_left_alone(self) -> None:
        self.leave('image_backup')
        self.after_death()
        self.assertEqual([], self.saves)
        self.assertEqual(1, len(self.settled))

    def test_state_that_can_not_be_saved_does_not_hold_up_the_start(
            self) -> None:
        self.patch_name('nova.objects.Instance.save',
                        lambda instance, expected_task_state: 1 / 0)
        self.assertEqual('image_backup', self.free(
            'image_backup', 'image_backup'))
        self.assertEqual(1, len(self.settled))


class TestImage(ReconcileTestCase):

    def test_image_is_settled_once_and_the_record_is_gone(self) -> None:
        self.leave('image_snapshot', 10, 20)
        self.after_death(self.instance)
        [(proxy, snapshot, announced, keep, patient)] = self.settled
        self.assertEqual(
            ('proxy', 'image-1', [10, 20], None, True),
            (proxy, snapshot.image_id, announced, keep, patient))
        self.assertEqual([], os.listdir(self.state))

    def test_it_may_be_kept_with_the_reason(self) -> None:
        self.config(dead_image='keep', group='snapshot_ext')
        self.leave()
        self.after_death()
        self.assertIn('nova-compute died', self.settled[0][3])

    def test_no_clear_answer_is_asked_for_again(self) -> None:
        self.answers = [
            exception.ImageRefused('401'), exception.ImageGone('404'),
            OSError('time-out'), ValueError('not JSON'), 'is deleted']
        self.leave()
        self.after_death()
        self.assertEqual([5.0, 10.0, 20.0, 40.0], self.waits)
        self.assertEqual([], os.listdir(self.state))
        self.assertEqual(1, self.output.output.count('tried again'))

    def test_it_is_not_asked_for_ever(self) -> None:
        self.answers = [exception.ImageRefused('403')]
        record = self.leave()
        self.after_death()
        self.assertTrue(24 * 3600 <= self.now <= 25 * 3600, self.now)
        self.assertLess(len(self.settled), 200)
        # The next start goes on with it.
        self.assertTrue(os.path.exists(record.path))
        self.assertIn(f'{record.path} is left for the next start',
                      self.output.output)
        self.answers = ['is deleted']
        self.after_death()
        self.assertEqual([], os.listdir(self.state))

    def test_image_that_is_never_found_is_given_up_with_a_warning(
            self) -> None:
        self.answers = [exception.ImageGone('404')]
        self.leave()
        self.after_death()
        self.assertTrue(24 * 3600 <= self.now <= 25 * 3600, self.now)
        self.assertEqual([], os.listdir(self.state))
        self.assertIn('is gone, or is not shown to [service_user]',
                      self.output.output)

    def test_store_may_take_as_long_as_for_a_living_one(self) -> None:
        for seconds, patient in (100, 5), (1000, 8):
            self.config(answer_timeout=seconds, group='snapshot_ext')
            self.answers = [exception.ImageServiceError('saving')] * 9 + [
                'done']
            self.now = 0.0
            self.settled.clear()
            self.leave()
            self.after_death()
            self.assertEqual(
                [True] * patient + [False] * (10 - patient),
                [patient for *_, patient in self.settled])

    def test_image_that_nova_did_not_live_to_delete_is_deleted(self) -> None:
        self.leave('image_snapshot', failure='no socket')
        self.after_death(self.instance)
        why = 'no socket; then nova-compute died'
        self.assertEqual([f'{why}; image-1 is deleted'], self.told)
        self.assertEqual([], os.listdir(self.state))

    def test_image_that_nova_deleted_is_not_asked_for_again(self) -> None:
        self.answers = [exception.ImageGone('404')]
        self.leave('image_snapshot', failure='no socket')
        self.after_death(self.instance)
        self.assertEqual(1, len(self.settled))
        self.assertEqual([], os.listdir(self.state))
        self.assertNotIn('tried again', self.output.output)

    def test_one_that_can_not_be_settled_keeps_no_other(self) -> None:
        self.answers = [exception.ImageRefused('403'), 'one', 'other']
        self.leave()
        in_flight.Record.begin(self.state, in_flight.Snapshot(
            'image-2', fakes.UUID, 'project', 'user', 'req-2', None)).close()
        self.after_death()
        self.assertEqual([5.0], self.waits)
        self.assertEqual([], os.listdir(self.state))

    def test_snapshot_of_a_living_process_is_left_alone(self) -> None:
        with in_flight.Record.begin(self.state, in_flight.Snapshot(
                'image-1', fakes.UUID, 'project', 'user', 'req-1',
                'image_backup')):
            self.after_death(self.instance)
        self.assertEqual(([], [], []),
                         (self.settled, self.saves, self.told))

    def test_record_that_makes_no_sense_stops_no_other(self) -> None:
        path = os.path.join(self.state, f'a{in_flight.SUFFIX}')
        with open(path, 'w') as file:
            file.write('{}\n')
        self.leave()
        self.after_death()
        self.assertEqual(1, len(self.settled))
        self.assertTrue(os.path.exists(path))
        self.assertIn(f'{path} says which snapshot', self.output.output)


class TestFurther(ReconcileTestCase):
    """Images of further disks: as that of the root disk goes, so do they."""

    def test_they_are_settled_after_it(self) -> None:
        for whole in (False, True):
            self.whole = whole
            self.further.clear()
            self.leave('image_snapshot', 10, further=('image-2', 'image-3'))
            self.after_death(self.instance)
            self.assertEqual([('image-2', whole, False),
                              ('image-3', whole, False)], self.further)
            self.assertIn('image-1 is deleted; image-2 is settled; image-3 '
                          'is settled', self.told[-1])
            self.assertEqual([], os.listdir(self.state))

    def test_they_wait_for_a_clear_answer_about_it(self) -> None:
        self.answers = [exception.ImageServiceError('saving'), 'is active']
        self.patch_name('time.sleep', lambda seconds: self.assertEqual(
            [], self.further))
        self.leave(further=('image-2',))
        self.after_death()
        self.assertEqual([('image-2', False, False)], self.further)

    def test_they_do_not_wait_for_one_that_is_gone(self) -> None:
        self.answers = [exception.ImageGone('404')]
        self.patch_name('time.sleep', self.wait_once)
        self.leave(further=('image-2',))
        self.after_death()

    def wait_once(self, seconds: float) -> None:
        self.assertEqual([('image-2', False, False)], self.further)
        self.wait(24 * 3600)

    def test_they_go_with_one_that_nova_deleted(self) -> None:
        self.answers = [exception.ImageGone('404')]
        self.leave(failure='no socket', further=('image-2',))
        self.after_death()
        self.assertEqual([('image-2', False, True)], self.further)
        self.assertEqual([], os.listdir(self.state))

    def test_each_is_settled_once(self) -> None:
        self.further_errors = [exception.ImageRefused('403')]
        self.leave(failure='no socket', further=('image-2', 'image-3'))
        self.after_death()
        self.assertEqual(['image-2', 'image-3'],
                         [image_id for image_id, *_ in self.further])
        self.assertEqual([5.0], self.waits)
        self.assertEqual([], os.listdir(self.state))

    def test_one_that_is_not_shown_is_gone_if_the_root_disks_is_shown(
            self) -> None:
        self.further_errors = [exception.ImageGone('404')]
        self.leave(further=('image-2', 'image-3'))
        self.after_death()
        self.assertIn('image-1 is deleted; image image-2 is gone; image-3 '
                      'is settled', self.told[-1])
        self.assertEqual([], self.waits)

    def test_one_that_is_not_shown_either_is_asked_for_again(self) -> None:
        # Until an operator gives the rights.
        self.answers = [exception.ImageGone('404')] * 2 + ['is deleted']
        self.further_errors = [exception.ImageGone('404')] * 2
        self.leave(further=('image-2',))
        self.after_death()
        self.assertEqual([('image-2', False, False)], self.further)
        self.assertEqual([5.0, 10.0], self.waits)
        self.assertEqual([], os.listdir(self.state))

    def test_one_that_is_never_shown_is_named(self) -> None:
        for failure in ('no socket', None):
            self.now = 0.0
            self.answers = [exception.ImageGone('404')]
            self.further_errors = [exception.ImageGone('404')] * 999
            self.leave(failure=failure, further=('image-2',))
            self.after_death()
            self.assertEqual([], os.listdir(self.state))
            self.assertEqual(1 if failure else 2, self.output.output.count(
                'image image-2 is gone, or is not shown to [service_user]'))

    def test_what_a_living_process_left_is_settled_too(self) -> None:
        self.answers = [exception.ImageGone('404')]
        record = in_flight.Record.begin(self.state, in_flight.Snapshot(
            'image-1', fakes.UUID, 'project', 'user', 'req-1', None),
            reconcile.settle_later)
        record.begin_further('image-2')
        with fixtures.MonkeyPatch('threading.Timer.start',
                                  lambda timer: timer.function()):
            error = exception.SnapshotError('no socket')
            record.__exit__(type(error), error, None)
        self.assertEqual([('image-2', False, True)], self.further)
        self.assertIn('no socket; image-2 is settled', self.output.output)
        self.assertNotIn('died', self.output.output)
        self.assertEqual([], os.listdir(self.state))


class TestEvents(ReconcileTestCase):

    def test_request_says_how_its_snapshot_ended(self) -> None:
        self.leave()
        self.after_death()
        died = 'nova-compute died while the snapshot was taken'
        self.assertEqual([died, f'{died}; image-1 is deleted'], self.told)
        for context in self.contexts:
            self.assertEqual(
                ('req-1', 'project', 'user', True),
                (context.request_id, context.project_id, context.user_id,
                 context.is_admin))

    def test_line_and_notification_say_so_once(self) -> None:
        sent: list[tuple[nova_context.RequestContext, accounts.Account]] = []
        self.patch_name('nova_snapshot_ext.notification.send',
                        lambda *what: sent.append(what))
        self.answers = [exception.ImageRefused('503'), 'is deleted']
        self.leave()
        self.after_death()
        [line] = [line for line in self.output.output.splitlines()
                  if 'Snapshot ended: ' in line]
        values = accounts.parsed(line)
        self.assertEqual(
            ('failed', fakes.UUID, 'image-1', 'req-1', 'ComputeDied',
             'nova-compute died while the snapshot was taken', '-'),
            tuple(values[name] for name in (
                'outcome', 'instance', 'image', 'request', 'error',
                'reason', 'total_s')))
        [(context, account)] = sent
        self.assertEqual('req-1', context.request_id)
        self.assertEqual(line, account.line())

    def test_snapshot_that_had_failed_has_had_its_line(self) -> None:
        self.leave('image_snapshot', failure='no socket')
        self.after_death(self.instance)
        self.assertNotIn('Snapshot ended: ', self.output.output)

    def test_it_is_said_before_glance_answers(self) -> None:
        self.answers = [exception.ImageRefused('503'), 'is deleted']
        waits: list[int] = []
        self.patch_name('time.sleep',
                        lambda seconds: waits.append(len(self.told)))
        self.leave()
        self.after_death()
        self.assertEqual([1], waits)

    def test_nobody_may_be_there_to_tell(self) -> None:
        for error in (
                nova_exception.InstanceActionNotFound(
                    request_id='r', instance_uuid='i'),
                nova_exception.InstanceActionEventNotFound(
                    action_id='a', event='e'),
                ZeroDivisionError()):
            self.tell_error = error
            self.leave()
            self.after_death()
            self.assertEqual([], os.listdir(self.state))


class TestCredentials(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.asked: list[typing.Any] = []
        self.patch_name(
            'nova_snapshot_ext.nova_compat.image_proxy', lambda auth: (
                self.asked.append(auth),
                type('Proxy', (), {'endpoint_override': None})())[1])

    def configure(self, text: str) -> None:
        path = self.new_file('nova.conf', text.encode())
        # Of its own: what a plugin of keystoneauth needs stays registered.
        configuration = cfg.ConfigOpts()
        conf.register_opts(configuration)
        configuration.register_opt(cfg.ListOpt('api_servers'), 'glance')
        configuration([], project='nova', default_config_files=[path])
        self.patch_name('nova_snapshot_ext.reconcile.CONF', configuration)

    AUTH = ('auth_type = password\nauth_url = http://keystone\n'
            'username = {}\npassword = secret\nproject_name = service\n')

    def user(self) -> object:
        return self.asked[-1]._username

    def test_those_of_service_user_serve(self) -> None:
        self.configure('[service_user]\n' + self.AUTH.format('nova'))
        proxy = reconcile.glance()
        self.assertEqual('nova', self.user())
        self.assertIsNone(proxy.endpoint_override)

    def test_a_group_of_its_own_may_have_them(self) -> None:
        self.configure(
            '[snapshot_ext]\ndead_image_auth = cleaner\n'
            '[cleaner]\n' + self.AUTH.format('cleaner')
            + '[glance]\napi_servers = http://glance:9292/\n')
        proxy = reconcile.glance()
        self.assertEqual('cleaner', self.user())
        self.assertEqual('http://glance:9292/v2', proxy.endpoint_override)

    def test_none_at_all_are_said(self) -> None:
        self.configure('')
        self.assertRaisesRegex(
            exception.ImageServiceError,
            r'dead_image_auth = service_user.*no auth_type',
            reconcile.glance)
        self.configure('[service_user]\nauth_type = telepathy\n')
        self.assertRaisesRegex(
            exception.ImageServiceError, 'does not sign on',
            reconcile.glance)
