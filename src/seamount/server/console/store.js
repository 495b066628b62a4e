// Keeps conversations in the browser's IndexedDB, and small things that must survive a sudden exit in localStorage.
// Nothing here goes to the server.

const RESCUE = "seamount.rescue";
const DRAFTS = "seamount.drafts";

const promised = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** Reads a JSON value from localStorage; `fallback` where there is none or it cannot be read. */
export function readLocal(key, fallback) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? fallback;
  } catch {
    return fallback;
  }
}

/** Writes a JSON value to localStorage; false where the browser refuses (shut or full). */
export function writeLocal(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** What was typed and not sent, by place: "new", a conversation id, or conversation id and message id. */
export const drafts = {
  get: (place) => readLocal(DRAFTS, {})[place] ?? "",
  set(place, text) {
    const all = readLocal(DRAFTS, {});
    if (text) all[place] = text;
    else delete all[place];
    writeLocal(DRAFTS, all);
  },
};

/** Opens the store. Rejects where the browser has no usable IndexedDB. */
export async function openStore() {
  const opening = indexedDB.open("seamount", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("conversations", { keyPath: "id" });
  const database = await promised(opening);
  const channel = new BroadcastChannel("seamount");
  const objects = (mode) => database.transaction("conversations", mode).objectStore("conversations");

  const store = {
    /** All conversations. What the last page saved on its way out replaces what is older in the database. */
    async all() {
      const saved = new Map((await promised(objects("readonly").getAll())).map((each) => [each.id, each]));
      for (const rescued of readLocal(RESCUE, [])) {
        if ((saved.get(rescued.id)?.updated ?? 0) > rescued.updated) continue;
        saved.set(rescued.id, rescued);
        await store.put(rescued);
      }
      localStorage.removeItem(RESCUE);
      return [...saved.values()];
    },
    get: (id) => promised(objects("readonly").get(id)),
    async put(conversation) {
      await promised(objects("readwrite").put(conversation));
      channel.postMessage(conversation.id);
    },
    async remove(id) {
      await promised(objects("readwrite").delete(id));
      channel.postMessage(id);
    },
    /** Synchronous, for the moment the page goes away: IndexedDB may not finish then. */
    rescue: (conversations) => writeLocal(RESCUE, conversations),
    /** Calls back with the id of a conversation that another tab has written or removed. */
    onOtherTab(callback) {
      channel.onmessage = (event) => callback(event.data);
    },
  };
  return store;
}

/** Stands in where the browser keeps nothing (private windows of some browsers): the page works until it is closed. */
export const memoryStore = {
  all: async () => [],
  get: async () => undefined,
  put: async () => {},
  remove: async () => {},
  rescue: () => false,
  onOtherTab() {},
};
