// The API key that this page sends. Kept in memory, and for this tab's reloads too where the user wants that; never in an
// address, never in what outlives the tab.

const NAME = "seamount.key";

let key = "";
try {
  key = sessionStorage.getItem(NAME) ?? "";
} catch {
  // Storage is shut: the key then lives as long as the page.
}

export const hasKey = () => key !== "";

/** The public id within the key: "sm-ID-SECRET". */
export const keyId = () => key.split("-")[1] ?? "";

/** True where the key outlives a reload of this tab. */
export function isKept() {
  try {
    return sessionStorage.getItem(NAME) !== null;
  } catch {
    return false;
  }
}

/** Sends this key from now on; "" sends none. */
export function setKey(next, keep) {
  key = next;
  try {
    if (keep && next) sessionStorage.setItem(NAME, next);
    else sessionStorage.removeItem(NAME);
  } catch {
    // As above.
  }
}

/** The headers of a request that prove who asks. */
export const proof = () => (key ? { authorization: `Bearer ${key}` } : {});

/** Headers hold visible ASCII only; the browser would refuse to send anything else. */
export const isSendable = (text) => /^[\x21-\x7e]+$/.test(text);
