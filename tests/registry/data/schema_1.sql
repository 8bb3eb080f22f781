BEGIN TRANSACTION;
CREATE TABLE experts (
	id INTEGER NOT NULL, 
	name VARCHAR(128) NOT NULL, 
	version INTEGER NOT NULL, 
	current BOOLEAN NOT NULL, 
	spec TEXT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (name, version)
);
INSERT INTO "experts" VALUES(1,'base',1,0,'{"name":"base","kind":"model","source":"fake://echo","revision":null,"base":null,"model":null,"api_key_env":null,"members":[],"architecture":null,"parameters_total":null,"parameters_active":null,"size_bytes":null,"context_length":2048,"price":null,"capabilities":["chat"],"licence":null,"description":"the first","tags":[],"digest":"sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","files":[],"version":1}');
INSERT INTO "experts" VALUES(2,'sql',1,1,'{"name":"sql","kind":"adapter","source":"fake://upper","revision":null,"base":"base","model":null,"api_key_env":null,"members":[],"architecture":null,"parameters_total":null,"parameters_active":null,"size_bytes":null,"context_length":null,"price":null,"capabilities":["chat"],"licence":null,"description":"","tags":["sql","zoo"],"digest":"sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","files":[],"version":1}');
INSERT INTO "experts" VALUES(3,'base',2,1,'{"name":"base","kind":"model","source":"fake://echo","revision":null,"base":null,"model":null,"api_key_env":null,"members":[],"architecture":null,"parameters_total":null,"parameters_active":null,"size_bytes":null,"context_length":2048,"price":null,"capabilities":["chat"],"licence":null,"description":"described better","tags":[],"digest":"sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","files":[],"version":2}');
INSERT INTO "experts" VALUES(4,'gone',1,0,'{"name":"gone","kind":"model","source":"fake://echo","revision":null,"base":null,"model":null,"api_key_env":null,"members":[],"architecture":null,"parameters_total":null,"parameters_active":null,"size_bytes":null,"context_length":null,"price":null,"capabilities":["chat"],"licence":null,"description":"","tags":[],"digest":null,"files":[],"version":1}');
CREATE TABLE registry_state (
	id INTEGER NOT NULL, 
	schema INTEGER NOT NULL, 
	version INTEGER NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "registry_state" VALUES(1,1,4);
CREATE INDEX ix_experts_name ON experts (name);
CREATE INDEX ix_experts_current ON experts (current);
COMMIT;
