"""Who may do what on the loopback Hub: users by their tokens, and their repositories."""

import secrets
from collections.abc import Callable

from loopback_repository import Repository
from loopback_server import Answer, Call, LoopbackServer, Refused, route


class Accounts(LoopbackServer):
    """The user "me" (`token` writes, `read_token` only reads) and the user "other" (`other_token` writes).

    A repository belongs to the user that its id begins with. What a user cannot see is answered like what is not there.
    """

    def __init__(self):
        super().__init__()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.token, self.read_token, self.other_token = (f"hf_{secrets.token_hex(17)}" for _ in range(3))
        self.users = {self.token: ("me", True), self.read_token: ("me", False), self.other_token: ("other", True)}
        self.repositories: dict[str, Repository] = {}

    @route("GET", "/api/whoami-v2")
    def _whoami(self, call: Call) -> Answer:
        name, may_write = self._logged_in(call)
        token = {"displayName": "tests", "role": "write" if may_write else "read"}
        auth = {"type": "access_token", "accessToken": token}
        return Answer({"type": "user", "name": name, "fullname": name, "orgs": [], "auth": auth})

    @route("POST", "/api/repos/create")
    def _create(self, call: Call) -> Answer:
        repo_id = self._named_in(call)
        owner = repo_id.partition("/")[0]
        if self._logged_in(call) != (owner, True):
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self.repositories:
            raise Refused(409, "You already created this model repo", url=url)
        self.repositories[repo_id] = Repository(repo_id, private=call.json().get("visibility") == "private")
        return Answer({"url": url, "name": repo_id, "id": repo_id})

    @route("DELETE", "/api/repos/delete")
    def _delete(self, call: Call) -> Answer:
        del self.repositories[self._writable(call, self._named_in(call)).id]
        return Answer()

    @route("PUT", "/api/models/ID/settings")
    def _settings(self, call: Call, repo_id: str) -> Answer:
        repository, wanted = self._writable(call, repo_id), call.json()
        if "visibility" in wanted:
            repository.private = wanted["visibility"] == "private"
        repository.gated = wanted.get("gated", repository.gated)
        return Answer({"private": repository.private, "gated": repository.gated})

    def _logged_in(self, call: Call) -> tuple[str, bool]:
        """The user, and whether the token may write."""
        if call.token is None:
            raise Refused(401, "Invalid username or password.")
        if call.token not in self.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.users[call.token]

    def _visible(self, call: Call, repo_id: str) -> Repository:
        repository = self.repositories.get(repo_id)
        user = self._logged_in(call)[0] if call.token else None
        if repository is None or (repository.private and user != repository.owner):
            # For anonymous users of huggingface.co the client infers this code from the address.
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def _readable(self, call: Call, repo_id: str) -> Repository:
        repository = self._visible(call, repo_id)
        user = self._logged_in(call)[0] if call.token else None
        if repository.gated and user != repository.owner:
            raise Refused(403 if user else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
        return repository

    def _uploadable(self, call: Call, repo_id: str) -> Repository:
        """For whoever may write at all: a pull request may follow."""
        repository = self._readable(call, repo_id)
        if not self._logged_in(call)[1]:
            raise Refused(403, "You don't have the rights to write with this token")
        return repository

    def _pushable(self, call: Call, repo_id: str, revision: str) -> Repository:
        """For its owner; and for those who open a pull request, or add to one of theirs."""
        repository = self._uploadable(call, repo_id)
        proposal = repository.proposals.get(revision)
        if "create_pr" in call.query or (proposal and proposal.author == self._logged_in(call)[0]):
            return repository
        return self._writable(call, repo_id)

    def _writable(self, call: Call, repo_id: str) -> Repository:
        repository = self._uploadable(call, repo_id)
        if self._logged_in(call)[0] != repository.owner:
            raise Refused(403, f"You don't have the rights to change {repo_id}")
        return repository

    def _named_in(self, call: Call) -> str:
        wanted = call.json()
        return f"{wanted.get('organization') or self._logged_in(call)[0]}/{wanted['name']}"


def named_by(find: Callable[[str], str], revision: str) -> str:
    """What a method of a repository finds for a revision; the Hub's error if there is none."""
    try:
        return find(revision)
    except KeyError:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None
