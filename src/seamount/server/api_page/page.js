// Shows the server's own OpenAPI document. Nothing is asked of any other machine: the online validator is off, and no
// address in this page's own can name another document.
"use strict";

window.SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#api",
  deepLinking: true,
  displayRequestDuration: true,
  validatorUrl: null,
  queryConfigEnabled: false,
  persistAuthorization: false, // a key is forgotten with the page
  onComplete: () => {
    document.documentElement.dataset.ready = "";
  },
});
